"""Digits → how near cheap IHVPs come to the exact one, at what cost."""

from weighmatch.pipelines.ihvp_analysis.pipeline import create_pipeline

__all__ = ["create_pipeline"]
