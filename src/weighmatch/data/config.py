"""What `data_preparation` can be asked for, checked before any work starts."""

import math
from dataclasses import dataclass, field
from typing import Literal

from weighmatch.checks import (
    require_choice,
    require_group,
    require_integer,
    require_number,
    require_seeds,
)
from weighmatch.data.glyphs import GlyphConfig
from weighmatch.data.sources import DIGITS_PER_CLASS, MIXED, OodSource

Source = Literal["digits", "glyphs"]
SOURCES: tuple[Source, ...] = ("digits", "glyphs")
Regime = Literal["fixed_total", "added"]
REGIMES: tuple[Regime, ...] = ("fixed_total", "added")


def seed_key(seed: int) -> str:
    """Name of a seed's files, such as seed_0010."""
    return f"seed_{seed:04d}"


def proportional(sizes: list[int], total: int) -> list[int]:
    """Cut `total` ≤ sum(sizes) in proportion to `sizes`, by largest remainders."""
    shares = [size * total / sum(sizes) for size in sizes]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda k: counts[k] - shares[k])
    for position in by_remainder[: total - sum(counts)]:
        counts[position] += 1
    return counts


@dataclass(frozen=True)
class DataConfig:
    """Splits and contamination.

    Attributes:
        seeds: one complete set of splits for each.
        labels_per_class: labelled images of each seen class.
        seen_classes: digits that the classifier knows; the others are the unseen classes. Glyphs
            have theirs in `glyphs`.
        ood_source: "unseen" classes, natural "patches", "noise", some of them joined by "+", or
            a "mix" of the three; in equal parts.
        ratio: r = |U_OOD| / |U| of the unlabelled pool, 0 ≤ r < 1.
        regime: "fixed_total": `pool_size` images whatever r is; "added": `id_size`
            in-distribution images, and OOD added until their share is r.
        pool_size: |U| of the regime "fixed_total".
        id_size: in-distribution images of the regime "added".
        heldout_size: in-distribution unlabelled images held out of training, and as many OOD.
        test_size: images of seen classes to test on.
        source: "digits" of scikit-learn, or "glyphs": rendered characters.
        shifted: share of the unlabelled and test images that is of the domain `glyphs.shift`;
            no labelled image is.
        glyphs: what they look like.
    """

    seeds: tuple[int, ...]
    labels_per_class: int = 4
    seen_classes: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    ood_source: str = "unseen"
    ratio: float = 0.75
    regime: Regime = "fixed_total"
    pool_size: int = 600
    id_size: int = 150
    heldout_size: int = 150
    test_size: int = 270
    source: Source = "digits"
    shifted: float = 0.0
    glyphs: GlyphConfig = field(default_factory=GlyphConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", require_seeds("data.seeds", self.seeds))
        for name in ("labels_per_class", "pool_size", "id_size", "heldout_size", "test_size"):
            require_integer(f"data.{name}", getattr(self, name), 1)
        require_choice("data.source", self.source, SOURCES)
        glyphs = require_group("data.glyphs", self.glyphs, GlyphConfig)
        object.__setattr__(self, "glyphs", glyphs)
        self._check_classes()
        self._check_ood_source()
        require_choice("data.regime", self.regime, REGIMES)
        require_number("data.ratio", self.ratio, 0, 1)
        require_number("data.shifted", self.shifted, 0, 1, below=False)
        if (self.shifted > 0) != (self.source == "glyphs" and self.glyphs.shift != "none"):
            raise ValueError(
                f"data.shifted is {self.shifted}, but data.source is {self.source} and "
                f"data.glyphs.shift is {self.glyphs.shift}; a share above 0 needs glyphs and a "
                "shift, and a shift needs a share"
            )
        if self.pool_id < 1:
            raise ValueError(
                f"data.ratio {self.ratio} leaves no in-distribution image in a pool of "
                f"{self.pool_size}; lower it or raise data.pool_size"
            )
        if self.source == "digits":
            self._check_supply()

    def _check_classes(self) -> None:
        classes = self.seen_classes
        known = range(len(DIGITS_PER_CLASS))
        if (
            not isinstance(classes, list | tuple)
            or any(type(c) is not int or c not in known for c in classes)
            or len(set(classes)) < len(classes)
            or len(classes) < 2
        ):
            raise ValueError(
                f"data.seen_classes must be at least two different digits 0–9, got {classes!r}"
            )
        object.__setattr__(self, "seen_classes", tuple(classes))

    def _check_ood_source(self) -> None:
        parts = self.ood_source.split("+") if isinstance(self.ood_source, str) else [None]
        if self.ood_source != "mix" and (
            any(part not in MIXED for part in parts) or len(set(parts)) < len(parts)
        ):
            raise ValueError(
                f"data.ood_source {self.ood_source!r} is unknown; choose from mix, "
                f"{', '.join(MIXED)}, or several joined by +, such as unseen+patches"
            )

    def _check_supply(self) -> None:
        seen = [DIGITS_PER_CLASS[c] for c in self.seen_classes]
        if self.labels_per_class > min(seen):
            raise ValueError(
                f"data.labels_per_class is {self.labels_per_class}, but the rarest seen class has "
                f"only {min(seen)} images; lower it"
            )
        labelled = self.labels_per_class * len(seen)
        needed = labelled + self.heldout_size + self.test_size + self.pool_id
        tested = proportional(seen, min(self.test_size, sum(seen)))
        heldout = proportional(seen, min(self.heldout_size, sum(seen)))
        short = any(
            t + h + self.labels_per_class > n for t, h, n in zip(tested, heldout, seen, strict=True)
        )
        size = "data.id_size" if self.regime == "added" else "data.pool_size"
        if needed > sum(seen):
            raise ValueError(
                f"data asks for {needed} images of seen classes ({labelled} labelled, "
                f"{self.pool_id} in the pool, {self.heldout_size} held out, {self.test_size} "
                f"for the test), but there are {sum(seen)}; lower data.labels_per_class, "
                f"{size}, data.heldout_size or data.test_size"
            )
        if short:
            raise ValueError(
                "data.labels_per_class leaves too few images of the rarest seen class for the "
                "held-out and test images; lower it, data.heldout_size or data.test_size"
            )
        wanted = self.ood_counts(self.pool_ood)["unseen"]
        wanted += self.ood_counts(self.heldout_size)["unseen"]
        unseen = sum(DIGITS_PER_CLASS) - sum(seen)
        if wanted > unseen:
            raise ValueError(
                f"data asks for {wanted} images of unseen classes (pool and held-out), but there "
                f"are {unseen}; lower data.ratio, {size} or data.heldout_size, or choose the "
                f"data.ood_source patches or noise"
            )

    @property
    def classes(self) -> int:
        """Number of seen classes."""
        return len(self.seen_classes if self.source == "digits" else self.glyphs.seen)

    @property
    def pool_ood(self) -> int:
        """OOD images in the pool."""
        if self.regime == "fixed_total":
            return round(self.ratio * self.pool_size)
        return round(self.id_size * self.ratio / (1 - self.ratio))

    @property
    def pool_id(self) -> int:
        """In-distribution images in the pool."""
        return self.id_size if self.regime == "added" else self.pool_size - self.pool_ood

    def ood_counts(self, total: int) -> dict[OodSource, int]:
        """How many of `total` OOD images come from each source."""
        wanted = self.ood_source.split("+")
        parts = [source for source in MIXED if self.ood_source == "mix" or source in wanted]
        counts: dict[OodSource, int] = dict.fromkeys(MIXED, 0)
        for position, source in enumerate(parts):
            counts[source] = (total + len(parts) - 1 - position) // len(parts)
        return counts
