"""Raw images → splits with a contaminated unlabelled pool."""

from weighmatch.pipelines.data_preparation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
