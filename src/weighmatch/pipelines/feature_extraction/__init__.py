"""Images → features of a frozen backbone, where the network is one."""

from weighmatch.pipelines.feature_extraction.pipeline import create_pipeline

__all__ = ["create_pipeline"]
