"""FixMatch with a weight on every unlabelled image; usable without Kedro.

from weighmatch.semisup import RunConfig, Trainer, TrainingConfig, TrainingSet
Trainer(RunConfig("learned", seed=0, steps=1000, classes=6, training=TrainingConfig())).fit(
    TrainingSet(labelled_images, labels, unlabelled_images), Path("run")
)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weighmatch.semisup.config import AugmentationConfig, TrainingConfig, WeighingConfig
    from weighmatch.semisup.parts.networks import ConfidenceNetwork, build_classifier
    from weighmatch.semisup.rounds import RoundsTrainer
    from weighmatch.semisup.trainer import RunConfig, Trainer, TrainingSet
    from weighmatch.semisup.two_stages import TwoStageTrainer

_HOMES = {
    "AugmentationConfig": "config",
    "ConfidenceNetwork": "parts.networks",
    "RoundsTrainer": "rounds",
    "RunConfig": "trainer",
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "TrainingSet": "trainer",
    "TwoStageTrainer": "two_stages",
    "WeighingConfig": "config",
    "build_classifier": "parts.networks",
}

__all__ = [
    "AugmentationConfig",
    "ConfidenceNetwork",
    "RoundsTrainer",
    "RunConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingSet",
    "TwoStageTrainer",
    "WeighingConfig",
    "build_classifier",
]


def __getattr__(name: str) -> Any:
    """Import on demand: parameters are checked without waiting for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weighmatch.semisup.{_HOMES[name]}"), name)
