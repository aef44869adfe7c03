"""Ranking a folder of images with a stored run: any number of them, in little memory.

Files are listed, decoded and scored a few thousand at a time. What is said of them goes to a data
base on disk, which sorts it.
"""

import csv
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from weighmatch.data.decoding import decode_many
from weighmatch.data.files import Rejected, Shape, decode, walk_images
from weighmatch.data.rank_config import Preparation
from weighmatch.evaluation.gallery_page import OF_A_CLASS, OVERALL, render_gallery
from weighmatch.evaluation.ranking import COLUMNS, SURE, calibrate
from weighmatch.export import Portable
from weighmatch.semisup.checkpoint import BATCH, CPU, TrainedRun
from weighmatch.semisup.weightings.base import confidence_weights

# Files and bytes of images that are decoded together, and rows of a table written together.
FILES_AT_ONCE, BYTES_AT_ONCE, ROWS_AT_ONCE = 8192, 2**28, 10_000
# What the data base keeps in memory, in KiB.
CACHE = 65_536
RANKING, REJECTED, GALLERY = "ranking", "rejected_files.csv", "gallery.html"


class Scorer:
    """What a run says of images, batch by batch, each image apart from the others."""

    def __init__(self, run: TrainedRun) -> None:
        self.run = run
        self._model = Portable(run).eval()
        self._weighting = run._load_weighting(run.classifier, CPU)

    def __call__(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities (n, classes), scores and weights of any scale (n,)."""
        with torch.no_grad():
            found = [self._model(part) for part in torch.from_numpy(images).split(BATCH)]
            probabilities, scores = (torch.cat(part).double() for part in zip(*found, strict=True))
            if self.run.ranker is None:
                weights = self._weighting.sized(scores)
            else:
                weights = confidence_weights(scores, self.run.pool.cut)
        return probabilities.numpy(), scores.numpy(), weights.double().numpy()


def rank_folder(
    run: TrainedRun,
    root: str | Path,
    folder: Path,
    preparation: Preparation = Preparation(),  # noqa: B008 (frozen)
    temperature: float | None = None,
    workers: int | Literal["auto"] = "auto",
) -> int:
    """Rank the images below a folder that the run never saw.

    Memory depends on neither the number of files nor that of folders.

    Args:
        run: the stored run.
        root: the folder; nothing in it is changed.
        folder: gets ranking.csv, ranking.parquet, gallery.html and rejected_files.csv, with the
            columns that the ranking of a pool has. `weight` has mean 1 over these files.
        preparation: how files become images.
        temperature: that of the calibrated probabilities, if known.
        workers: processes that decode; "auto": one a core.

    Returns:
        How many images were ranked.

    Raises:
        ValueError: if there is no such folder, or no image in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".ranking.sqlite"
    path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as base:
            _prepare(base)
            scorer = Scorer(run)
            for part in _parts(walk_images(root), run.image_shape):
                _add(base, scorer, Path(root), part, preparation, workers)
            ((count,),) = base.execute("SELECT COUNT(*) FROM images")
            if not count:
                raise ValueError(f"no file in {root} can be used as an image; give another folder")
            _order(base, run)
            _write_tables(base, run, folder, temperature)
            page = _page(base, run, Path(root), preparation, temperature, count)
            (folder / GALLERY).write_text(page, "utf-8")
    finally:
        for left in folder.glob(".ranking.sqlite*"):
            left.unlink()
    return int(count)


def _prepare(base: sqlite3.Connection) -> None:
    # What is written can be made again: no journal is needed.
    base.executescript(
        f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{CACHE};"
        "CREATE TABLE images (path TEXT, score REAL, weight REAL, class INTEGER,"
        " confidence REAL, probabilities BLOB);"
        "CREATE TABLE rejected (path TEXT, reason TEXT);"
    )


def _parts(found: Iterator[str | Rejected], shape: Shape) -> Iterator[list[str | Rejected]]:
    count = max(1, min(FILES_AT_ONCE, BYTES_AT_ONCE // math.prod(shape)))
    while part := list(islice(found, count)):
        yield part


def _add(
    base: sqlite3.Connection,
    scorer: Scorer,
    root: Path,
    part: list[str | Rejected],
    preparation: Preparation,
    workers: int | Literal["auto"],
) -> None:
    """Decode and score some files."""
    rejected = [one for one in part if isinstance(one, Rejected)]
    names = [one for one in part if isinstance(one, str)]
    files = [root / name for name in names]
    fit, background = preparation.fit, preparation.background
    images, kept = [], []
    for position, one in decode_many(files, scorer.run.image_shape, fit, background, workers):
        if isinstance(one, Rejected):
            rejected.append(Rejected(names[position], one.reason))
        else:
            images.append(one.image)
            kept.append(names[position])
    rows = [(one.path, one.reason) for one in rejected]
    base.execute("BEGIN")
    base.executemany("INSERT INTO rejected VALUES (?, ?)", rows)
    if images:
        probabilities, scores, weights = scorer(np.stack(images))
        base.executemany(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)",
            zip(
                kept,
                scores.tolist(),
                weights.tolist(),
                probabilities.argmax(axis=1).tolist(),
                probabilities.max(axis=1).tolist(),
                (row.astype(np.float32).tobytes() for row in probabilities),
                strict=True,
            ),
        )
    base.execute("COMMIT")


def _order(base: sqlite3.Connection, run: TrainedRun) -> None:
    """A table of places, best first; and the full weight, half of which is kept."""
    # A ranking with a cut gives full weight above it, and there may be no such image.
    full = "MAX(weight)" if run.ranker is None else "1.0"
    base.executescript(
        f"CREATE TABLE full AS SELECT {full} AS weight FROM images LIMIT 1;"
        "CREATE TABLE ranked AS SELECT rowid AS image FROM images"
        f" ORDER BY {KEPT} DESC, score DESC, confidence DESC, path;"
    )


KEPT = "2 * weight >= (SELECT weight FROM full)"
ROW = (
    "SELECT path, score, weight / (SELECT AVG(weight) FROM images),"
    f" {KEPT}, class, confidence, probabilities"
    " FROM ranked JOIN images ON images.rowid = ranked.image"
)


def _tables(
    base: sqlite3.Connection, run: TrainedRun, temperature: float | None, where: str
) -> Iterator[pd.DataFrame]:
    """Rows of the ranking with the columns `COLUMNS`, `ROWS_AT_ONCE` at a time."""
    names = np.array(run.class_names or [str(k) for k in range(run.config.classes)])
    cursor = base.execute(f"{ROW} {where} ORDER BY ranked.rowid")
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        paths, scores, weights, kept, classes, confidence, blobs = zip(*rows, strict=True)
        likely = np.full(len(rows), np.nan)
        if temperature is not None:
            probabilities = np.stack([np.frombuffer(blob, np.float32) for blob in blobs])
            likely = calibrate(probabilities.astype(np.float64), temperature).max(axis=1)
        columns = {
            "path": paths,
            "score": scores,
            "weight": weights,
            "kept": np.array(kept, bool),
            "predicted_class": names[list(classes)],
            "probability": likely,
            "confidence": confidence,
            "near_duplicate_of": "",
            "why_low": [
                "" if keep else _why(sure) for keep, sure in zip(kept, confidence, strict=True)
            ],
        }
        yield pd.DataFrame(columns)[list(COLUMNS)]


def _why(confidence: float) -> str:
    unlike = "unlike the labelled images"
    return unlike if confidence >= SURE else f"{unlike}; the classifier is unsure"


def _write_tables(
    base: sqlite3.Connection, run: TrainedRun, folder: Path, temperature: float | None
) -> None:
    writer: Any = None
    with (folder / f"{RANKING}.csv").open("w", encoding="utf-8", newline="") as file:
        for number, table in enumerate(_tables(base, run, temperature, "")):
            table.to_csv(file, index=False, header=number == 0)
            content = pa.Table.from_pandas(table, preserve_index=False)
            if writer is None:
                writer = pq.ParquetWriter(folder / f"{RANKING}.parquet", content.schema)
            writer.write_table(content)
    writer.close()
    with (folder / REJECTED).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "reason"])
        rows.writerows(base.execute("SELECT path, reason FROM rejected ORDER BY path"))


def _page(
    base: sqlite3.Connection,
    run: TrainedRun,
    root: Path,
    preparation: Preparation,
    temperature: float | None,
    count: int,
) -> str:
    """The gallery of the first and the last, over all and of each class."""
    chosen = _ends(base, "", OVERALL)
    for number in range(run.config.classes):
        chosen |= _ends(base, f"WHERE class = {number}", OF_A_CLASS)
    places = ", ".join(map(str, sorted(chosen)))
    table = pd.concat(_tables(base, run, temperature, f"WHERE ranked.rowid IN ({places})"))
    table = table.reset_index(drop=True)
    fit, background = preparation.fit, preparation.background

    def load(row: int) -> NDArray[np.uint8]:
        return decode(root / table["path"][row], run.image_shape, fit, background)

    return render_gallery(table, load, count)


def _ends(base: sqlite3.Connection, where: str, count: int) -> set[int]:
    join = f"SELECT ranked.rowid FROM ranked JOIN images ON images.rowid = ranked.image {where}"
    return {
        place
        for order in ("", "DESC")
        for (place,) in base.execute(f"{join} ORDER BY ranked.rowid {order} LIMIT {count}")
    }
