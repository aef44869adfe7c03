"""The gallery: one self-contained page with the images that rank highest and lowest."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]

# Images of a list over all classes, and of the two lists of a class.
OVERALL, OF_A_CLASS = 48, 12
# Classes with lists of their own, those with most images first: a page holds only so much.
MAX_CLASSES = 30
# The longer side of a thumbnail in pixels; smaller images are kept as they are.
THUMBNAIL = 96
# Images of at most this side are shown with hard edges, so that each pixel can be seen.
SMALL = 48


@dataclass(frozen=True)
class Card:
    """What the page says of one image; numbers are rounded text, sizes are in pixels."""

    path: str
    predicted_class: str
    kept: bool
    score: str
    weight: str
    sureness: str
    why_low: str
    near_duplicate_of: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Section:
    """One list of the page.

    Attributes:
        title: its heading.
        rows: positions of its images in the ranking.
    """

    title: str
    rows: tuple[int, ...]


def choose_sections(ranking: pd.DataFrame, classes: Sequence[str] | None = None) -> list[Section]:
    """The lists of the page.

    Args:
        ranking: a table whose first row is the most useful image.
        classes: those with lists of their own, if the table has too few rows to tell.
    """
    sections = _both_ends(np.arange(len(ranking)), OVERALL, "")
    counts = ranking["predicted_class"].value_counts()
    for name in sorted(counts.index[:MAX_CLASSES] if classes is None else classes):
        members = np.flatnonzero((ranking["predicted_class"] == name).to_numpy())
        sections += _both_ends(members, OF_A_CLASS, f"{name}: ")
    return sections


def _both_ends(order: NDArray[np.intp], count: int, prefix: str) -> list[Section]:
    count = min(count, -(-len(order) // 2))
    titles = ("trusted most", "trusted least")
    parts = (order[:count], order[::-1][: min(count, len(order) - count)])
    return [
        Section(prefix + title if prefix else title.capitalize(), tuple(part.tolist()))
        for title, part in zip(titles, parts, strict=True)
        if len(part)
    ]


def render_gallery(
    ranking: pd.DataFrame,
    load: Callable[[int], Images],
    total: int | None = None,
    classes: Sequence[str] | None = None,
    pile: Path | None = None,
) -> str:
    """The page.

    Args:
        ranking: from `ranking_table`, or its rows that are worth showing.
        load: gives the image of a row by its position, (C, H, W) uint8.
        total: how many images were ranked, if the table has only some of them.
        classes: see `choose_sections`.
        pile: where the images lie, if the page should say so.
    """
    sections = choose_sections(ranking, classes)
    shown = sorted({row for section in sections for row in section.rows})
    cards = {row: _card(ranking.iloc[row], load(row)) for row in shown}
    sides = [max(card.width, card.height) for card in cards.values()]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("weighmatch.evaluation")
    template = folder.joinpath("gallery.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        title="Which images are useful?",
        summary=_summarise(ranking, total),
        pile=pile,
        note="A weight of 1 is that of plain FixMatch.",
        classes=sorted({card.predicted_class for card in cards.values()}),
        reasons=_reasons(card.why_low for card in cards.values()),
        rendering="pixelated" if max(sides, default=0) <= SMALL else "auto",
        sections=[
            {
                "title": section.title,
                "cards": [cards[row] for row in section.rows],
            }
            for section in sections
        ],
    )


def _summarise(ranking: pd.DataFrame, total: int | None) -> str:
    if total is not None and total > len(ranking):
        return f"{total:,} images were ranked; the highest and the lowest are shown."
    kept = int(ranking["kept"].sum())
    images = int((ranking["near_duplicate_of"] == "").sum())
    share = 100 * kept / max(images, 1)
    return f"{kept:,} of {images:,} images were kept as useful ({share:.0f}\u202f%)."


def _reasons(words: Iterable[str]) -> Sequence[str]:
    return sorted({reason for text in words for reason in text.split("; ") if reason})


def _card(row: Any, image: Images) -> Card:
    known = row["probability"] == row["probability"]
    sure = f"{'probability' if known else 'confidence'} "
    sure += f"{row['probability'] if known else row['confidence']:.2f}"
    height, width = image.shape[1:]
    return Card(
        path=row["path"],
        predicted_class=row["predicted_class"],
        kept=bool(row["kept"]),
        score=f"{row['score']:.3f}",
        weight=f"{row['weight']:.2f}",
        sureness=sure,
        why_low=row["why_low"],
        near_duplicate_of=row["near_duplicate_of"],
        source=thumbnail(image),
        width=width,
        height=height,
    )


def thumbnail(image: Images) -> str:
    """An image (C, H, W) as a data URI: PNG where it is small, else JPEG."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    small = max(picture.size) <= SMALL
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
