"""Scores, statistics, figures and the report: reads tables, knows no training."""
