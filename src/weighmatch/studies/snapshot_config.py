"""Parameters of the study of FixMatch's snapshots (`meta_learning_analysis.snapshots`)."""

from dataclasses import dataclass
from functools import partial

from weighmatch.checks import require_multiple, require_seeds
from weighmatch.data.config import DataConfig
from weighmatch.semisup.config import TrainingConfig
from weighmatch.studies.checking import check_fields, each, integer, number

_GROUP = "meta_learning_analysis.snapshots"
RATIO = 0.75


@dataclass(frozen=True)
class SnapshotConfig:
    """What is trained, where it is frozen and how influence is computed there.

    Attributes:
        seeds: seeds of splits, training and every draw.
        labels_per_class: number of labelled images of each seen class.
        pool_size: unlabelled images, three quarters of them of unseen classes.
        steps: steps of FixMatch.
        stages: where the classifier is copied, as fractions of `steps`.
        dampings: δ as multiples of the curvature's largest eigenvalue, on top of the weight
            decay; the weight decay alone and no curvature at all are always added.
        products: `max_products` of conjugate gradients.
        copies: number of strong views of each labelled image in the outer loss.
        draws: number of draws of the augmentation that an image's influence is averaged over.
        curvature_batch: number of labelled views in the curvature, and of unlabelled ones.
        width: first-layer channels of the classifier.
        threshold: τ of FixMatch.
    """

    seeds: tuple[int, ...] = tuple(range(10))
    labels_per_class: int = 2
    pool_size: int = 600
    steps: int = 1000
    stages: tuple[float, ...] = (0.1, 0.4, 1.0)
    dampings: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)
    products: int = 10
    copies: int = 32
    draws: int = 4
    curvature_batch: int = 32
    width: int = 16
    threshold: float = 0.95

    def __post_init__(self) -> None:
        check_fields(
            self,
            _GROUP,
            {
                "seeds": require_seeds,
                "labels_per_class pool_size steps copies draws curvature_batch": integer(1),
                "products": integer(2),
                "threshold": number(0, 1, above=True, below=True),
                "stages": each(number(0, 1, above=True)),
                "dampings": each(number(0, 1e6, above=True)),
                "width": partial(require_multiple, of=4, reason="GroupNorm has 4 groups"),
            },
        )
        try:
            self.data(self.seeds[0])
        except ValueError as error:
            raise ValueError(
                f"{_GROUP}.labels_per_class or {_GROUP}.pool_size does not fit the digits: {error}"
            ) from error

    def data(self, seed: int) -> DataConfig:
        """The splits of one seed."""
        return DataConfig((seed,), self.labels_per_class, ratio=RATIO, pool_size=self.pool_size)

    def training(self) -> TrainingConfig:
        """FixMatch, on the CPU."""
        return TrainingConfig(
            width=self.width,
            steps=self.steps,
            threshold=self.threshold,
            snapshots=1,
            checkpoint_every=self.steps,
            device="cpu",
        )
