"""What the studies can be asked for; imports no torch."""

from dataclasses import dataclass

from weighmatch.checks import require_integer, require_number, require_seeds


@dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    Attributes:
        hidden: width of the MLP's hidden layer.
        pool: how many pool images get a weight.
        steps: full-batch Adam steps of the inner training.
        l2: weight decay of the inner loss, λ.
        dampings: δ as multiples of λ_max.
        budgets: `max_products` of the iterative methods.
        seeds: how many of the data's seeds, from the first.
    """

    hidden: int = 12
    pool: int = 200
    steps: int = 300
    l2: float = 1e-3
    dampings: tuple[float, ...] = (1.0, 0.1, 0.01)
    budgets: tuple[int, ...] = (5, 10, 20, 40, 80)
    seeds: int = 2

    def __post_init__(self) -> None:
        for name in ("hidden", "pool", "steps", "seeds"):
            require_integer(f"ihvp_analysis.{name}", getattr(self, name), 1)
        require_number("ihvp_analysis.l2", self.l2, 0, 10)
        if not isinstance(self.dampings, list | tuple) or not self.dampings:
            raise ValueError(
                f"ihvp_analysis.dampings must be a list of numbers, got {self.dampings!r}"
            )
        for damping in self.dampings:
            require_number("ihvp_analysis.dampings", damping, 0, 10, above=True)
        budgets = require_seeds("ihvp_analysis.budgets", self.budgets)
        for budget in budgets:
            require_integer("ihvp_analysis.budgets", budget, 4)
        object.__setattr__(self, "dampings", tuple(self.dampings))
        object.__setattr__(self, "budgets", budgets)
