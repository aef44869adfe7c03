"""Digits → when implicit meta-learning generalises, forgets, diverges, and what it costs."""

from weighmatch.pipelines.meta_learning_analysis.pipeline import create_pipeline

__all__ = ["create_pipeline"]
