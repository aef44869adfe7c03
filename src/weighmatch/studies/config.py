"""What the studies can be asked for; imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from weighmatch.checks import require_boolean, require_choice, require_seeds
from weighmatch.studies.checking import check_fields, each, integer, number, workers

NETWORKS = ("softmax", "mlp", "cnn")
INDEFINITE = "indefinite"


@dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    A cell is a point of training, an L2 strength, a damping, a precision and a batch. The base
    cell is the end of training with the first L2 and the first damping, in double precision on
    all inner images; by default one factor at a time is moved away from it.

    Attributes:
        networks: "softmax", or "mlp-<width>" and "cnn-<width>".
        seeds: seeds of split, noise and initialisation.
        inner: number of images that the inner loss is taken on, each with a weight.
        outer: number of images that the outer loss is taken on.
        label_noise: share of the inner images with a wrong label.
        steps: full-batch Adam steps of the inner training; L-BFGS then goes on to a minimum.
        stages: points of training, as fractions of `steps`; 1.0 is the minimum.
        indefinite: whether the snapshot with the most negative curvature is a stage too.
        l2: strengths λ of the inner loss's (λ/2)‖θ‖².
        dampings: δ as multiples of the curvature's largest eigenvalue, on top of λ.
        budgets: `max_products` of the iterative methods, ranks and probes to match.
        batches: number of random mini-batches of inner images, for the spread over them.
        batch_size: number of images in a mini-batch.
        largest_dense: parameters up to which the curvature of a network without normalisation is
            the Hessian; beyond, it is the Gauss-Newton matrix.
        all_combinations: every stage with every L2 and damping, instead of one at a time.
        memory_sizes: about how many parameters the networks have whose memory is measured.
        workers: number of processes; "auto": one a core.
    """

    networks: tuple[str, ...] = ("softmax", "mlp-16", "cnn-4")
    seeds: tuple[int, ...] = (0,)
    inner: int = 100
    outer: int = 300
    label_noise: float = 0.2
    steps: int = 300
    stages: tuple[float, ...] = (0.5, 1.0)
    indefinite: bool = True
    l2: tuple[float, ...] = (1e-2,)
    dampings: tuple[float, ...] = (0.01, 0.1)
    budgets: tuple[int, ...] = (5, 10, 20, 40)
    batches: int = 2
    batch_size: int = 40
    largest_dense: int = 3000
    all_combinations: bool = False
    memory_sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_fields(
            self,
            "ihvp_analysis",
            {
                "inner outer steps batch_size largest_dense": integer(1),
                "batches": integer(0),
                "workers": workers,
                "indefinite all_combinations": require_boolean,
                "label_noise": number(0, 1),
                "stages": each(number(0, 1)),
                "l2": each(number(0, 10, above=True)),
                "dampings": each(number(0, 10)),
                "budgets": each(integer(4), in_order=True),
                "memory_sizes": each(integer(100), in_order=True),
                "seeds": require_seeds,
                "networks": each(lambda _, name: parse_network(name)),
            },
        )
        if self.inner + self.outer > 1797:
            raise ValueError(
                f"ihvp_analysis.inner + ihvp_analysis.outer must be at most the 1797 digits there "
                f"are, got {self.inner + self.outer}"
            )
        if self.batch_size > self.inner:
            raise ValueError(
                f"ihvp_analysis.batch_size must be at most ihvp_analysis.inner ({self.inner}), "
                f"got {self.batch_size}"
            )


def parse_network(name: Any) -> tuple[str, int]:
    """Kind and width of "softmax", "mlp-16" or "cnn-4" (width 0 for softmax).

    Raises:
        ValueError: if it is none of these.
    """
    kind, _, width = str(name).partition("-")
    require_choice("ihvp_analysis.networks", kind, NETWORKS)
    if kind == "softmax" and not width:
        return kind, 0
    multiple = 4 if kind == "cnn" else 1
    if kind == "softmax" or not width.isdigit() or not int(width) or int(width) % multiple:
        raise ValueError(
            f"ihvp_analysis.networks {name!r} is unknown; give softmax, mlp-<width> or "
            f"cnn-<width, a multiple of 4>"
        )
    return kind, int(width)
