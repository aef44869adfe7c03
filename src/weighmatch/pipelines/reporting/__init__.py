"""Tables → figures and the report."""

from weighmatch.pipelines.reporting.pipeline import create_pipeline

__all__ = ["create_pipeline"]
