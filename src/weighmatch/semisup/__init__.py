"""FixMatch with a weight on every unlabelled image; usable without Kedro.

from weighmatch.semisup import RunConfig, TrainingConfig, TrainingSet, make_schedule
data = TrainingSet(labelled_images, labels, unlabelled_images)
config = RunConfig("learned", 0, 1000, data.classes, TrainingConfig(), "rounds", 4)
run = make_schedule(config).fit(data, Path("run"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weighmatch.semisup.checkpoint import TrainedRun
    from weighmatch.semisup.config import AugmentationConfig, RunsConfig, TrainingConfig
    from weighmatch.semisup.parts.networks import ConfidenceNetwork, build_classifier
    from weighmatch.semisup.training.config import RunConfig, TrainingSet
    from weighmatch.semisup.training.schedules import make_schedule

_HOMES = {
    "AugmentationConfig": "config",
    "ConfidenceNetwork": "parts.networks",
    "RunConfig": "training.config",
    "RunsConfig": "config",
    "TrainedRun": "checkpoint",
    "TrainingConfig": "config",
    "TrainingSet": "training.config",
    "build_classifier": "parts.networks",
    "make_schedule": "training.schedules",
}

__all__ = [
    "AugmentationConfig",
    "ConfidenceNetwork",
    "RunConfig",
    "RunsConfig",
    "TrainedRun",
    "TrainingConfig",
    "TrainingSet",
    "build_classifier",
    "make_schedule",
]


def __getattr__(name: str) -> Any:
    """Import on demand: parameters are checked without waiting for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weighmatch.semisup.{_HOMES[name]}"), name)
