"""A stored run and a folder of new images → their ranking."""

from weighmatch.pipelines.rank.pipeline import create_pipeline

__all__ = ["create_pipeline"]
