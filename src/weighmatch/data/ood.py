"""The kinds of unlabelled images: in-distribution, and every kind of OOD that a pool can hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OodKind:
    """One kind of unlabelled images.

    Attributes:
        name: what parameters, manifest and tables call it.
        label: what legends of figures call it.
        colour: the colour of its marks and frames in figures.
        words: what a sentence of the report calls it.
    """

    name: str
    label: str
    colour: str
    words: str


# The position of a kind is its code in the truth about a pool. Colours: Okabe & Ito (2008).
OOD_KINDS = (
    OodKind("id", "in-distribution", "#009E73", "images of seen classes"),
    OodKind("unseen", "unseen classes (OOD)", "#D55E00", "images of unseen classes"),
    OodKind("patches", "photograph patches (OOD)", "#CC79A7", "patches of photographs"),
    OodKind("noise", "noise (OOD)", "#E69F00", "noise"),
    OodKind("foreign", "another data set (OOD)", "#0072B2", "images of another data set"),
)
KIND_NAMES = tuple(kind.name for kind in OOD_KINDS)
# What an `ood_source` joins by "+", and what "mix" holds in equal parts.
MIXED = ("unseen", "patches", "noise")


def get_kind(name: str) -> OodKind:
    """The kind of that name; a KeyError if there is none."""
    return {kind.name: kind for kind in OOD_KINDS}[name]


def ood_parts(ood_source: str) -> tuple[str, ...]:
    """The kinds that an `ood_source` such as "unseen+patches" or "mix" draws from."""
    wanted = MIXED if ood_source == "mix" else ood_source.split("+")
    return tuple(name for name in KIND_NAMES if name in wanted)


def describe_ood(ood_source: str) -> str:
    """An `ood_source` in the words of the report, such as "noise" or "patches … and noise"."""
    if ood_source == "mix":
        return "a mix of unseen classes, photograph patches and noise"
    return " and ".join(get_kind(name).words for name in ood_source.split("+"))
