"""Predictions and the truth → scores, comparisons and a verdict."""

from weighmatch.pipelines.evaluation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
