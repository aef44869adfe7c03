"""A pile of images in shards: each is decoded and scored by itself, and kept in a file of its own.

A working folder holds all that a worker needs, so that any process of any machine that sees the
folder can score any shard. It also holds a manifest of the shards that are done of a pile. A job
that was killed goes on at those that are missing, also where files were added or removed since, or
where another pile was ranked in between.
"""

import hashlib
import io
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from weighmatch.code import code_digest
from weighmatch.data.containers import UnseenError, base_of, decode_members, decode_surely
from weighmatch.data.files import Fit, RejectedFileError, Shape, UnfitFolderError
from weighmatch.data.listing import PileList, write_list
from weighmatch.data.rank_config import Preparation
from weighmatch.data.splits import Images
from weighmatch.export import RUN, Portable
from weighmatch.semisup.checkpoint import BATCH, CPU, TrainedRun
from weighmatch.semisup.weightings.base import confidence_weights

log = logging.getLogger(__name__)

# Images of a shard, and their bytes, at most. They have less than half of it on average.
FILES_AT_ONCE, BYTES_AT_ONCE = 2048, 2**26
PLAN, FILES, MANIFEST = "plan.json", "files.sqlite", "manifest.jsonl"
SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("path", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("weight", pa.float64()),
        ("class", pa.int32()),
        ("confidence", pa.float64()),
        ("probabilities", pa.binary()),
    ]
)


class Scorer:
    """What a run says of images, batch by batch, each image apart from the others.

    Args:
        run: the run.
        device: where its networks compute.
    """

    def __init__(self, run: TrainedRun, device: torch.device = CPU) -> None:
        self.run, self.device = run, device
        self._model = Portable(run, device).eval()
        self._weighting = run._load_weighting(run.classifier, CPU)

    def __call__(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities (n, classes), scores and weights of any scale (n,)."""
        with torch.no_grad():
            parts = torch.from_numpy(images).split(BATCH)
            found = [self._model(part.to(self.device)) for part in parts]
            probabilities, scores = (
                torch.cat(part).cpu().double() for part in zip(*found, strict=True)
            )
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
        size: images of a shard at most.
        device: the type of device that scores; another one gives slightly other numbers.
        run: SHA-256 of the file of the run.
        code: identifies the code that scores.
    """

    root: str
    fit: Fit
    background: str
    size: int
    device: str
    run: str
    code: str


@dataclass(frozen=True)
class Shard:
    """A line of the manifest.

    Attributes:
        number: from 0, in the order of the files' paths.
        file: its name in the folder of the manifest.
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
    """The shards of a pile of images.

    Args:
        folder: the working folder. What it holds of another run is replaced.
        run: the stored run.
        root: the folder of images, or one container; nothing in it is changed.
        preparation: how files become images.
        device: the type of device that scores, "cpu" or "cuda".

    Attributes:
        listed: the list of the images.
        files: how many files and members of containers there are that may be images.
        kept: what is done, by number.

    Raises:
        UnfitFolderError: if there is no `root`, or if `folder` holds what no ranking wrote; nothing
            is replaced then.
        NoImageError: if nothing in `root` may be an image; nothing is replaced then.
    """

    def __init__(
        self,
        folder: Path,
        run: TrainedRun,
        root: str | Path,
        preparation: Preparation,
        device: str = "cpu",
    ) -> None:
        base = base_of(root)
        require_own(folder, (PLAN, RUN))
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        new_run, new_list = (folder / f"{name}.new" for name in (RUN, FILES))
        run.save(new_run)
        plan = Plan(
            root=str(base),
            fit=preparation.fit,
            background=preparation.background,
            size=max(1, min(FILES_AT_ONCE, BYTES_AT_ONCE // math.prod(run.image_shape))),
            device=device,
            run=hashlib.sha256(new_run.read_bytes()).hexdigest(),
            code=code_digest(__name__),
        )
        write_list(new_list, root, plan.size)
        known = _read_plan(folder)
        if known is None or replace(known, root=plan.root) != plan:
            for path in folder.glob(f"*{MANIFEST}"):
                path.unlink()
        (folder / PLAN).write_text(json.dumps(asdict(plan)), "utf-8")
        os.replace(new_run, folder / RUN)
        os.replace(new_list, folder / FILES)
        self.plan = plan
        self._done = _manifest_of(folder, plan.root)
        self.listed = PileList(folder / FILES)
        self.files = self.listed.count()
        self._count = len(self.listed)
        self.kept = {shard.number: shard for shard in self._manifest()}

    def __len__(self) -> int:
        return self._count

    def missing(self) -> list[int]:
        """The numbers of the shards that are not done."""
        return [number for number in range(len(self)) if number not in self.kept]

    def add(self, shard: Shard) -> None:
        """Write a shard that is done into the manifest.

        Raises:
            UnseenError: if its file is not here, or if it is one of an earlier list.
        """
        if not (self.folder / shard.file).exists():
            raise _unseen(self.folder)
        if shard.listed != self.listed.part(shard.number).listed:
            raise UnseenError(
                f"a machine of the cluster sees an earlier state of {self.folder}; start the same "
                "command again in a minute, which keeps the shards that are done"
            )
        with self._done.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(shard)) + "\n")
        self.kept[shard.number] = shard

    def read(self, number: int) -> pa.Table:
        """What was found of the images of a shard that is done; the columns of `SCHEMA`."""
        return pq.read_table(self.folder / self.kept[number].file)

    def decode(self, rows: Sequence[int], shape: Shape) -> Iterator[Images]:
        """Read images by their rows in the list, which are sorted; each is (C, H, W) uint8.

        One that cannot be read any more is white, and its path is logged.
        """
        plan, members = self.plan, self.listed.rows(rows)
        answers = decode_members(plan.root, members, shape, plan.fit, plan.background)
        for member, found in zip(members, answers, strict=True):
            if isinstance(found, RejectedFileError):
                log.warning("the gallery shows no picture of %s: %s", member.path, found.reason)
                yield np.full(shape, 255, np.uint8)
            else:
                yield found

    def hand_over(self, folder: Path) -> None:
        """Put the files of all shards, and a manifest in the order of their numbers, into a folder.

        Args:
            folder: is replaced (`require_own`). Nothing is taken from the working folder.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            for number in range(len(self)):
                shard = replace(self.kept[number], file=f"part-{number:08d}.parquet")
                _link(self.folder / self.kept[number].file, folder / shard.file)
                file.write(json.dumps(asdict(shard)) + "\n")

    def _manifest(self) -> Iterator[Shard]:
        """The shards that are done, of those that the list has, with their numbers there."""
        with self._done.open("ab+") as file:
            file.seek(0)
            content = file.read()
            # What was being written when a job was killed would spoil the next line.
            file.truncate(content.rfind(b"\n") + 1)
        for line in content.splitlines(keepends=True):
            with suppress(ValueError, TypeError):
                shard = Shard(**json.loads(line))
                number = self.listed.number_of(shard.listed)
                if line.endswith(b"\n") and number is not None and self._is_whole(shard):
                    yield replace(shard, number=number)

    def _is_whole(self, shard: Shard) -> bool:
        """Whether the file is as it was written."""
        path = self.folder / shard.file
        if not path.exists():
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256


def clear(folder: Path, root: str | Path) -> None:
    """Remove a working folder when a pile is ranked; what is done of another pile stays.

    Args:
        folder: the working folder of `Shards`.
        root: the pile.
    """
    mine = _manifest_of(folder, str(base_of(root)))
    if list(folder.glob(f"*{MANIFEST}")) == [mine]:
        shutil.rmtree(folder)
    else:
        mine.unlink()


def _manifest_of(folder: Path, root: str) -> Path:
    """The manifest of a pile in a working folder."""
    pile = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return folder / f"{pile}-{MANIFEST}"


def require_own(folder: Path, marks: tuple[str, ...] = (MANIFEST,)) -> None:
    """Raise an UnfitFolderError if a folder that will be replaced holds what no ranking wrote.

    Args:
        folder: may be missing.
        marks: how names of files begin, one of which a ranking has written into it.
    """
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if names and not any(name.startswith(marks) for name in names):
        raise UnfitFolderError(
            f"{folder} holds files that no ranking wrote; move it away, or let the ranking be "
            "written elsewhere"
        )


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy of it where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def score_shard(folder: Path, number: int, progress: Callable[[int], None]) -> Shard:
    """Decode and score the images of a shard, and write what is found.

    Args:
        folder: the working folder of `Shards`.
        number: which shard.
        progress: called with 1 for each image.

    Raises:
        UnseenError: if this machine does not see the folder, a file that was listed, or a GPU that
            the plan asks for.
    """
    plan = _read_plan(folder)
    if plan is None:
        raise _unseen(folder)
    scorer = _load(folder, plan)
    pile = PileList(folder / FILES)
    part = pile.part(number)
    members = pile.members(part)
    how = (scorer.run.image_shape, plan.fit, plan.background)
    answers = decode_surely(plan.root, members, *how, progress)
    images, places, paths, rejected = [], [], [], []
    for place, (member, found) in enumerate(zip(members, answers, strict=True)):
        if isinstance(found, RejectedFileError):
            rejected.append({"path": member.path, "reason": found.reason})
        else:
            images.append(found)
            places.append(place)
            paths.append(member.path)
    tables = [pa.Table.from_pylist(rejected, SCHEMA)]
    if images:
        probabilities, scores, weights = scorer(np.stack(images))
        scored = {
            "place": places,
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
    file = f"part-{part.listed[:32]}.parquet"
    # Two machines may be at the same shard, where one is taken for lost.
    partial = folder / f"{file}.{uuid4().hex}.partial"
    partial.write_bytes(content.getvalue())
    os.replace(partial, folder / file)
    checksum = hashlib.sha256(content.getvalue()).hexdigest()
    return Shard(number, file, len(paths), len(rejected), checksum, part.listed)


@lru_cache(maxsize=1)
def _load(folder: Path, plan: Plan) -> Scorer:
    """What scores, read once by each process."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UnseenError(
            f"rank.num_gpus asks for a GPU, and torch sees none on {socket.gethostname()}; leave "
            "rank.num_gpus out, or install a torch with CUDA on every machine"
        )
    return Scorer(TrainedRun.load(folder / RUN), torch.device(plan.device))


def _read_plan(folder: Path) -> Plan | None:
    # What another error hides may be the plan of shards that are done.
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Plan(**json.loads((folder / PLAN).read_text("utf-8")))
    return None


def _unseen(folder: Path) -> UnseenError:
    return UnseenError(
        f"a machine of the cluster does not see {folder}; put data_folder and the images on a "
        "folder that all machines share, under the same path"
    )
