"""Trained runs and images that they never saw → predictions and weights."""

from weighmatch.pipelines.scoring.pipeline import create_pipeline

__all__ = ["create_pipeline"]
