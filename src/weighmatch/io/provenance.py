"""What every dataset of a job was made from, and whether its files are whole and belong together.

Beside the data lies a folder of records: one JSON file a dataset, in a folder a pipeline. A record
has the checksum of each file, and the checksums of all datasets that went into it. Nothing depends
on times of files, so that files that were copied, or fetched by DVC, pass.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weighmatch.io.files import UnfitFileError, check_files, sha256_of, write_text
from weighmatch.io.partitions import Partitions


@dataclass(frozen=True)
class Record:
    """What is known of one dataset.

    Attributes:
        dataset: its name in the catalog.
        pipeline: name of the pipeline that made it.
        node: name of the node that made it.
        files: SHA-256 by path within the dataset's folder.
        parameters: checksums of the parameters that the node read, by name.
        code: digest of the code of the node, and of what it imports of this package.
        inputs: digests of the datasets that the node read, by name.
        ancestors: digests of all datasets that it was made from, directly or not, by name.
    """

    dataset: str
    pipeline: str
    node: str
    files: dict[str, str]
    parameters: dict[str, str] = field(default_factory=dict)
    code: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    ancestors: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the content of the dataset."""
        return digest_of(self.files)

    @property
    def origin(self) -> str:
        """Identifies what the node was given; all outputs of one run of it have the same."""
        return digest_of([self.parameters, self.code, self.inputs])


class Records:
    """The records of a job.

    Args:
        folder: holds a folder a pipeline.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, pipeline: str, dataset: str) -> Path:
        """The file of a dataset that a pipeline makes."""
        return self.folder / pipeline / f"{dataset}.json"

    def write(self, record: Record) -> None:
        """Keep what is known of a dataset, and forget what was known of it before."""
        for path in self.folder.glob(f"*/{record.dataset}.json"):
            if path.parent.name != record.pipeline:
                path.unlink(missing_ok=True)
        content = asdict(record)
        content["checksum"] = digest_of(content)
        path = self.path(record.pipeline, record.dataset)
        write_text(path, json.dumps(content, indent=1, sort_keys=True))

    def read(self, dataset: str) -> Record | None:
        """What is known of a dataset, or None.

        Raises:
            UnfitFileError: if the record is damaged.
        """
        for path in sorted(self.folder.glob(f"*/{dataset}.json")):
            try:
                content = json.loads(path.read_text("utf-8"))
                if content.pop("checksum") == digest_of(content):
                    return Record(**content)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UnfitFileError(f"{path} is damaged") from error
            raise UnfitFileError(f"{path} is damaged")
        return None


def digest_of(content: Any) -> str:
    """SHA-256 of what JSON can hold; the order of keys does not count."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- files of datasets -----------------------------------------------------------------------


def place_of(dataset: Any) -> Path | None:
    """The file or folder of a dataset of the catalog; None if it has none."""
    description = dataset._describe() if dataset is not None else {}
    place = description.get("filepath", description.get("path"))
    return None if place is None else Path(str(place))


def files_of(dataset: Any) -> dict[str, str]:
    """SHA-256 of every file of a dataset by its path within the dataset's folder.

    Raises:
        UnfitFileError: if a file is missing.
    """
    place = place_of(dataset)
    assert place is not None
    if isinstance(dataset, Partitions):
        return dataset.files()
    if place.is_dir():
        inside = sorted(path for path in place.rglob("*") if path.is_file())
        return {str(path.relative_to(place.parent)): sha256_of(path) for path in inside}
    if not place.exists():
        raise UnfitFileError(f"{place} does not exist")
    return {place.name: sha256_of(place)}


def require_whole(dataset: Any, record: Record | None) -> None:
    """Refuse a dataset unless its files are those that the record names.

    Raises:
        UnfitFileError: that names a file which is missing or damaged.
    """
    place = place_of(dataset)
    assert place is not None
    if not place.exists():
        raise UnfitFileError(f"{place} does not exist")
    listed = dataset.files() if isinstance(dataset, Partitions) else None
    if record is None:
        raise UnfitFileError(f"{place} was not finished, or was not made by a run of this project")
    check_files(place if listed is not None else place.parent, record.files)
    if listed is not None and listed != record.files:
        raise UnfitFileError(f"{place} was written again by a run that was cut off")


# --- what belongs together -------------------------------------------------------------------


def require_together(names: Iterable[str], records: Records, remade: Collection[str] = ()) -> None:
    """Refuse datasets that were made from different versions of the same dataset.

    Args:
        names: the datasets to be read.
        records: the records of their job.
        remade: datasets that do not count, as the run makes them anew.

    Raises:
        UnfitFileError: that says what does not belong together, and which pipelines to run.
    """
    read = {name: record for name in names if (record := _known(records, name)) is not None}
    known = dict(read)
    for record in read.values():
        for name in record.ancestors:
            if name not in known and name not in remade:
                found = _known(records, name)
                if found is not None:
                    known[name] = found
    wrong: dict[str, str] = {}  # what is wrong with a dataset
    _find_half_made(known, wrong)
    current = {name: record.digest for name, record in known.items()}
    for name, record in known.items():
        for other, digest in record.ancestors.items():
            if other in current and current[other] != digest and other not in remade:
                text = f"the dataset {name} was made from other {other} than lie in the data folder"
                wrong.setdefault(name, text)
    _find_different_ancestors(read, current, remade, wrong)
    if wrong:
        order = sorted(wrong, key=lambda name: len(known[name].ancestors))
        pipelines = list(dict.fromkeys(known[name].pipeline for name in order))
        raise UnfitFileError(f"{wrong[order[0]]}; run {in_words(pipelines)} again")


def _known(records: Records, name: str) -> Record | None:
    try:
        return records.read(name)
    except UnfitFileError:  # said where the dataset itself is read
        return None


def _find_half_made(known: Mapping[str, Record], wrong: dict[str, str]) -> None:
    """Find nodes of whose outputs some are of one run and some of another."""
    by_node: dict[str, list[Record]] = {}
    for record in known.values():
        by_node.setdefault(record.node, []).append(record)
    for made in by_node.values():
        first = made[0]
        for record in made[1:]:
            if record.origin != first.origin:
                wrong[first.dataset] = (
                    f"{first.dataset} and {record.dataset} are of two different runs of the "
                    f"pipeline {record.pipeline}"
                )


def _find_different_ancestors(
    read: Mapping[str, Record],
    current: Mapping[str, str],
    remade: Collection[str],
    wrong: dict[str, str],
) -> None:
    """Find datasets that were made from different versions of one that is no longer there."""
    used: dict[str, tuple[str, str]] = {}
    for name, record in read.items():
        for other, digest in record.ancestors.items():
            if other in current or other in remade:
                continue
            before, known = used.setdefault(other, (name, digest))
            if known != digest:
                wrong.setdefault(name, f"{before} and {name} were made from different {other}")


def in_words(pipelines: list[str]) -> str:
    """`the pipeline a`, or `the pipelines a, b and c`."""
    if len(pipelines) == 1:
        return f"the pipeline {pipelines[0]}"
    return f"the pipelines {', '.join(pipelines[:-1])} and {pipelines[-1]}"
