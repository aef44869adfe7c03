"""Training sets → checkpoints, one a run."""

from weighmatch.pipelines.training.pipeline import create_pipeline

__all__ = ["create_pipeline"]
