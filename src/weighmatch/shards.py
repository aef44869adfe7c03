"""A pile of images in shards: each is decoded and scored by itself, and kept in a file of its own.

A working folder holds all that a worker needs, so that any process of any machine that sees the
folder can score any shard. It also holds a manifest of the shards that are done. A job that was
killed goes on at those that are missing.
"""

import hashlib
import io
import json
import math
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from weighmatch.checks import ToldError
from weighmatch.code import code_digest
from weighmatch.data.containers import Member, decode_members, walk_members
from weighmatch.data.files import Fit, Rejected, RejectedFileError, Shape
from weighmatch.data.rank_config import Preparation
from weighmatch.data.splits import Images
from weighmatch.export import RUN, Portable
from weighmatch.semisup.checkpoint import BATCH, CPU, TrainedRun
from weighmatch.semisup.weightings.base import confidence_weights

# Images of a shard, and their bytes, at most.
FILES_AT_ONCE, BYTES_AT_ONCE = 1024, 2**26
# Rows that are listed together, and what a data base keeps in memory, in KiB.
ROWS_AT_ONCE, CACHE = 10_000, 65_536
PLAN, FILES, MANIFEST = "plan.json", "files.sqlite", "manifest.jsonl"
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("path", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("weight", pa.float64()),
        ("class", pa.int32()),
        ("confidence", pa.float64()),
        ("probabilities", pa.binary()),
    ]
)
# The columns of the list of images.
FIELDS = ", ".join(field.name for field in fields(Member))


class UnseenFolderError(ToldError, OSError):
    """A machine of a cluster does not see the working folder; the message says what to do."""


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


@dataclass(frozen=True)
class Plan:
    """What a working folder is about.

    Attributes:
        root: the folder of images.
        fit: see `weighmatch.data.files.decode`.
        background: see there.
        size: images of a shard.
        run: SHA-256 of the file of the run.
        code: identifies the code that scores.
    """

    root: str
    fit: Fit
    background: str
    size: int
    run: str
    code: str


@dataclass(frozen=True)
class Shard:
    """A line of the manifest.

    Attributes:
        number: from 0, in the order of the files' paths.
        file: its name in the working folder.
        images: how many images were scored.
        rejected: how many files, or members of containers, are no images.
        sha256: of the file.
        listed: identifies the paths, sizes and times of the files that were scored, and where in
            them the images lie.
    """

    number: int
    file: str
    images: int
    rejected: int
    sha256: str
    listed: str


class Shards:
    """The shards of a folder of images.

    Args:
        folder: the working folder. What it holds of another run or of other images is replaced.
        run: the stored run.
        root: the folder of images; nothing in it is changed.
        preparation: how files become images.

    Attributes:
        files: how many files and members of containers there are that may be images.
        kept: what is done, by number.

    Raises:
        ValueError: if there is no folder `root`.
    """

    def __init__(
        self, folder: Path, run: TrainedRun, root: str | Path, preparation: Preparation
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        run.save(folder / RUN)
        plan = Plan(
            root=str(Path(root).resolve()),
            fit=preparation.fit,
            background=preparation.background,
            size=max(1, min(FILES_AT_ONCE, BYTES_AT_ONCE // math.prod(run.image_shape))),
            run=hashlib.sha256((folder / RUN).read_bytes()).hexdigest(),
            code=code_digest(__name__),
        )
        if _read_plan(folder) != plan:
            shutil.rmtree(folder)
            folder.mkdir(parents=True)
            run.save(folder / RUN)
            (folder / PLAN).write_text(json.dumps(asdict(plan)), "utf-8")
        self.plan = plan
        self.files = _list_files(folder, root)
        self.kept = {shard.number: shard for shard in self._manifest() if self._is_whole(shard)}

    def __len__(self) -> int:
        return -(-self.files // self.plan.size)

    def missing(self) -> list[int]:
        """The numbers of the shards that are not done."""
        return [number for number in range(len(self)) if number not in self.kept]

    def add(self, shard: Shard) -> None:
        """Write a shard that is done into the manifest.

        Raises:
            UnseenFolderError: if its file is not here.
        """
        if not (self.folder / shard.file).exists():
            raise _unseen(self.folder)
        with (self.folder / MANIFEST).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(shard)) + "\n")
        self.kept[shard.number] = shard

    def read(self, number: int) -> pa.Table:
        """What was found of the images of a shard that is done; the columns of `SCHEMA`."""
        return pq.read_table(self.folder / self.kept[number].file)

    def decode(self, numbers: Sequence[int], shape: Shape) -> Iterator[Images]:
        """Read images by their numbers in the list, which are sorted; each is (C, H, W) uint8.

        Raises:
            RejectedFileError: if one cannot be used any more.
        """
        with closing(_open(self.folder)) as base:
            query = f"SELECT {FIELDS} FROM files WHERE rowid = ?"
            members = [Member(*base.execute(query, (k,)).fetchone()) for k in numbers]
        plan = self.plan
        for found in decode_members(plan.root, members, shape, plan.fit, plan.background):
            if isinstance(found, RejectedFileError):
                raise found
            yield found

    def rejected(self) -> Iterator[tuple[str, str]]:
        """Path and reason of what was seen to be no image when files were listed."""
        with closing(_open(self.folder)) as base:
            yield from base.execute("SELECT path, reason FROM rejected")

    def _manifest(self) -> Iterator[Shard]:
        path = self.folder / MANIFEST
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError):  # a line that was being written
                yield Shard(**json.loads(line))

    def _is_whole(self, shard: Shard) -> bool:
        """Whether the file is as it was written, and the files are those that it is about."""
        path = self.folder / shard.file
        if (
            not path.exists()
            or _listed(self.folder, shard.number, self.plan.size)[1] != shard.listed
        ):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256


def score_shard(folder: Path, number: int, progress: Callable[[int], None]) -> Shard:
    """Decode and score the images of a shard, and write what is found.

    Args:
        folder: the working folder of `Shards`.
        number: which shard.
        progress: called with 1 for each image.

    Raises:
        UnseenFolderError: if this machine does not see the folder.
    """
    plan = _read_plan(folder)
    if plan is None:
        raise _unseen(folder)
    scorer = _load(folder, plan)
    members, listed = _listed(folder, number, plan.size)
    shape = scorer.run.image_shape
    answers = decode_members(plan.root, members, shape, plan.fit, plan.background)
    # The data base numbers the rows of its list from 1.
    images, numbers, paths, rejected = [], [], [], []
    first = number * plan.size + 1
    for place, (member, found) in enumerate(zip(members, answers, strict=True), first):
        if isinstance(found, RejectedFileError):
            rejected.append({"path": member.path, "reason": found.reason})
        else:
            images.append(found)
            numbers.append(place)
            paths.append(member.path)
        progress(1)
    tables = [pa.Table.from_pylist(rejected, SCHEMA)]
    if images:
        probabilities, scores, weights = scorer(np.stack(images))
        scored = {
            "number": numbers,
            "path": paths,
            "reason": [None] * len(paths),
            "score": scores,
            "weight": weights,
            "class": probabilities.argmax(axis=1),
            "confidence": probabilities.max(axis=1),
            "probabilities": [row.astype(np.float32).tobytes() for row in probabilities],
        }
        tables.insert(0, pa.Table.from_pydict(scored, SCHEMA))
    content = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), content)
    file = f"part-{number:08d}.parquet"
    # Two machines may be at the same shard, where one is taken for lost.
    partial = folder / f"{file}.{uuid4().hex}.partial"
    partial.write_bytes(content.getvalue())
    os.replace(partial, folder / file)
    checksum = hashlib.sha256(content.getvalue()).hexdigest()
    return Shard(number, file, len(paths), len(rejected), checksum, listed)


@lru_cache(maxsize=1)
def _load(folder: Path, plan: Plan) -> Scorer:
    """What scores, read once by each process."""
    return Scorer(TrainedRun.load(folder / RUN))


def _read_plan(folder: Path) -> Plan | None:
    with suppress(OSError, ValueError, TypeError):
        return Plan(**json.loads((folder / PLAN).read_text("utf-8")))
    return None


def _unseen(folder: Path) -> UnseenFolderError:
    return UnseenFolderError(
        f"a machine of the cluster does not see {folder}; put data_folder and the images on a "
        "folder that all machines share, under the same path"
    )


# --- which files there are -----------------------------------------------------------------------


def _list_files(folder: Path, root: str | Path) -> int:
    """List the images in a data base, file by file; how many there are."""
    path = folder / FILES
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as base:
        base.executescript(
            f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{CACHE};"
            f"CREATE TABLE found ({FIELDS});"
            "CREATE TABLE rejected (path TEXT, reason TEXT);"
        )
        base.execute("BEGIN")
        for one in walk_members(root):
            if isinstance(one, Rejected):
                base.execute("INSERT INTO rejected VALUES (?, ?)", (one.path, one.reason))
            else:
                base.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", astuple(one))
        base.execute("COMMIT")
        base.execute("CREATE TABLE files AS SELECT * FROM found ORDER BY file, first")
        base.execute("DROP TABLE found")
        ((count,),) = base.execute("SELECT COUNT(*) FROM files")
    return int(count)


def _listed(folder: Path, number: int, size: int) -> tuple[list[Member], str]:
    """The images of a shard, and what identifies them."""
    with closing(_open(folder)) as base:
        between = (number * size + 1, (number + 1) * size)
        query = f"SELECT {FIELDS} FROM files WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
        rows = base.execute(query, between).fetchall()
    return [Member(*row) for row in rows], hashlib.sha256(repr(rows).encode()).hexdigest()


def _open(folder: Path) -> sqlite3.Connection:
    # Nobody writes any more: no lock is needed, which shared folders often lack.
    return sqlite3.connect(f"{(folder / FILES).absolute().as_uri()}?immutable=1", uri=True)
