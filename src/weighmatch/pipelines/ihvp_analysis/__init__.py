"""Labelled and pool images → how near cheap IHVPs come to the exact one."""

from weighmatch.pipelines.ihvp_analysis.pipeline import create_pipeline

__all__ = ["create_pipeline"]
