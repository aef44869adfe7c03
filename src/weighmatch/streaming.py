"""Ranking a folder of images with a stored run: any number of them, in little memory.

Images are listed, decoded and scored in shards (`weighmatch.shards`), by processes of this machine
or of a cluster. What is said of them goes to a data base on disk, which sorts it.
"""

import csv
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from weighmatch.checks import counted
from weighmatch.data.listing import make_base, require_some
from weighmatch.data.rank_config import Preparation
from weighmatch.engine_config import EngineConfig
from weighmatch.evaluation.gallery_page import (
    MAX_CLASSES,
    OF_A_CLASS,
    OVERALL,
    choose_sections,
    render_gallery,
)
from weighmatch.evaluation.ranking import COLUMNS, SURE, calibrate
from weighmatch.ray_engine import make_engine
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.shards import Shards, clear, require_own, score_shard

log = logging.getLogger(__name__)

# Rows of a table written together.
ROWS_AT_ONCE = 10_000
BASE, SHOWN, SHARDS = "ranking.sqlite", "shown.npy", "shards"
RANKING, REJECTED, GALLERY = "ranking", "rejected_files.csv", "gallery.html"


def rank_folder(
    run: TrainedRun,
    root: str | Path,
    folder: Path,
    preparation: Preparation = Preparation(),  # noqa: B008 (frozen)
    temperature: float | None = None,
    workers: int | Literal["auto"] = "auto",
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    work: Path | None = None,
) -> int:
    """Rank the images of a pile that the run never saw.

    Tar archives and Parquet files are containers of images (`weighmatch.data.containers`). Memory
    depends on neither the number of images nor that of folders, nor on sizes of containers. A call
    that was killed or that raised an error goes on from the shards that are done.

    Args:
        run: the stored run.
        root: the folder of images, or one container; nothing in it is changed.
        folder: gets ranking.csv, ranking.parquet, gallery.html and rejected_files.csv, with the
            columns that the ranking of a pool has. `weight` has mean 1 over these images. It also
            gets the folder `shards`.
        preparation: how files become images.
        temperature: that of the calibrated probabilities, if known.
        workers: processes that decode and score; "auto": one a core, or as many as a cluster has
            room for. The result does not depend on it.
        engine: where that is done. A worker that Ray gives a GPU, or a part of one, scores on it.
        work: a folder for what is done, which the caller clears when the ranking is in its place
            (`weighmatch.shards.clear`). None: one beside `folder` whose name ends in `.shards`,
            which is cleared at the end.

    Returns:
        How many images were ranked.

    Raises:
        UnfitFolderError: if there is no such folder, or if a folder that would be replaced holds
            what no ranking wrote.
        NoImageError: if there is no image in it.
        UnseenError: if a machine does not see the images, the working folder or a GPU.
    """
    require_own(folder / SHARDS)
    place = work or folder.with_name(f"{folder.name}.shards")
    device = "cuda" if engine.engine == "ray" and engine.num_gpus else "cpu"
    shards = Shards(place, run, root, preparation, device)
    _score(shards, workers, engine)
    count, rejected = _merge(shards, run, root, folder, temperature)
    log.info("%s: %s ranked", root, counted(count, "image is", "images are"))
    if rejected:
        one, many = "file or member of an archive is", "files or members of archives are"
        text = counted(rejected, one, many)
        log.warning("%s not used, or not as a whole; %s says why", text, REJECTED)
    if work is None:
        clear(place, root)
    return count


def _score(shards: Shards, workers: int | Literal["auto"], engine: EngineConfig) -> None:
    missing = shards.missing()
    if shards.kept:
        log.info("%d of %d shards are done and kept", len(shards.kept), len(shards))
    answers = make_engine(engine).run_in_pool(
        score_shard,
        [(shards.folder, number) for number in missing],
        workers,
        title="scoring images",
        total=shards.files,
        done=sum(shard.images + shard.rejected for shard in shards.kept.values()),
    )
    for _, shard in answers:
        shards.add(shard)


def _merge(
    shards: Shards,
    run: TrainedRun,
    root: str | Path,
    folder: Path,
    temperature: float | None,
) -> tuple[int, int]:
    """Rank what is in the shards; how many images, and how many rows say what is not used."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(make_base(shards.folder / BASE)) as base:
        base.executescript(
            "CREATE TABLE images (image INTEGER, path TEXT, score REAL, weight REAL,"
            " class INTEGER, confidence REAL, probabilities BLOB);"
            "CREATE TABLE rejected (path TEXT, reason TEXT);"
        )
        base.execute("BEGIN")
        base.executemany("INSERT INTO rejected VALUES (?, ?)", shards.listed.rejected())
        # In the order of the paths: sums of weights then do not depend on who was first.
        for number in range(len(shards)):
            _add(base, shards.listed.part(number).first, shards.read(number))
        base.execute("COMMIT")
        count = require_some(base, "images", root)
        _order(base, run)
        _write_tables(base, run, folder, temperature)
        pile = Path(root).expanduser().resolve()
        page = _page(base, run, shards, temperature, count, pile)
        (folder / GALLERY).write_text(page, "utf-8")
        ((rejected,),) = base.execute("SELECT COUNT(*) FROM rejected")
    shards.hand_over(folder / SHARDS)
    return count, int(rejected)


def _add(base: sqlite3.Connection, first: int, found: pa.Table) -> None:
    rows = [tuple(row.values()) for row in found.to_pylist()]
    rejected = [row[1:3] for row in rows if row[2] is not None]
    images = [(first + row[0], row[1], *row[3:]) for row in rows if row[2] is None]
    base.executemany("INSERT INTO rejected VALUES (?, ?)", rejected)
    base.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", images)


def _order(base: sqlite3.Connection, run: TrainedRun) -> None:
    """A table of the images, best first, whose rows are numbered by places from 1."""
    # A ranking with a cut gives full weight above it, and there may be no such image. Half of the
    # full weight is kept.
    full = "MAX(weight)" if run.ranker is None else "1.0"
    # The rows are sorted whole: to look each of them up would read the disk at random places.
    base.executescript(
        f"CREATE TABLE weights AS SELECT {full} AS full, AVG(weight) AS mean FROM images;"
        "CREATE TABLE ranked AS SELECT image, path, score, weight / mean AS weight,"
        " 2 * weight >= full AS kept, class, confidence, probabilities FROM images, weights"
        " ORDER BY kept DESC, score DESC, confidence DESC, path;"
        "DROP TABLE images;"
        "CREATE INDEX by_class ON ranked (class);"
    )


def _tables(
    base: sqlite3.Connection, run: TrainedRun, temperature: float | None, where: str
) -> Iterator[pd.DataFrame]:
    """Rows of the ranking with the columns `COLUMNS`, `ROWS_AT_ONCE` at a time."""
    names = np.array(_names(run))
    columns = "path, score, weight, kept, class, confidence, probabilities"
    cursor = base.execute(f"SELECT {columns} FROM ranked {where} ORDER BY rowid")
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        paths, scores, weights, kept, classes, confidence, blobs = zip(*rows, strict=True)
        likely = np.full(len(rows), np.nan)
        if temperature is not None:
            probabilities = np.stack([np.frombuffer(blob, np.float32) for blob in blobs])
            likely = calibrate(probabilities.astype(np.float64), temperature).max(axis=1)
        columns_of = {
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
        yield pd.DataFrame(columns_of)[list(COLUMNS)]


def _names(run: TrainedRun) -> Sequence[str]:
    return run.class_names or [str(k) for k in range(run.config.classes)]


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
    shards: Shards,
    temperature: float | None,
    count: int,
    pile: Path,
) -> str:
    """The gallery of the first and the last, over all and of each class with most images."""
    largest = base.execute(
        "SELECT class FROM ranked GROUP BY class ORDER BY COUNT(*) DESC, class LIMIT ?",
        (MAX_CLASSES,),
    ).fetchall()
    chosen = _ends(base, "", OVERALL)
    for (number,) in largest:
        chosen |= _ends(base, f"WHERE class = {number}", OF_A_CLASS)
    where = f"WHERE rowid IN ({', '.join(map(str, sorted(chosen)))})"
    table = pd.concat(_tables(base, run, temperature, where), ignore_index=True)
    classes = [_names(run)[number] for (number,) in largest]
    shown = {row for section in choose_sections(table, classes) for row in section.rows}
    query = f"SELECT image FROM ranked {where} ORDER BY rowid"
    listed = [row for (row,) in base.execute(query)]
    order = sorted(shown, key=lambda row: listed[row])
    # Read in the order of the list, as rows of a Parquet file have no quick access, and kept on
    # disk, as the page needs them in another order.
    shape = (len(table), *run.image_shape)
    images = np.lib.format.open_memmap(shards.folder / SHOWN, "w+", np.uint8, shape)
    found = shards.decode([listed[row] for row in order], run.image_shape)
    for row, image in zip(order, found, strict=True):
        images[row] = image
    return render_gallery(table, images.__getitem__, count, classes, pile)


def _ends(base: sqlite3.Connection, where: str, count: int) -> set[int]:
    """The places of the first and the last images."""
    query = f"SELECT rowid FROM ranked {where} ORDER BY rowid"
    return {
        place
        for order in ("", "DESC")
        for (place,) in base.execute(f"{query} {order} LIMIT {count}")
    }
