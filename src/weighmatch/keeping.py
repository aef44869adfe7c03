"""Kedro's hooks that lock a job, keep records of its files and check them before they are read."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from weighmatch import pipelines
from weighmatch.checks import ToldError
from weighmatch.code import code_digest
from weighmatch.hooks import RefusedError
from weighmatch.io.files import UnfitFileError, remove_orphans
from weighmatch.io.lock import HeldError, Lock, Locks
from weighmatch.io.provenance import (
    Record,
    Records,
    digest_of,
    files_of,
    in_words,
    place_of,
    require_together,
    require_whole,
)

log = logging.getLogger(__name__)

Catalog = CatalogProtocol[Any, Any]
PIPELINES = pipelines.__name__


class KeepsFilesWhole:
    """One run at a time writes to the outputs of a pipeline, and what is read is whole."""

    def __init__(self) -> None:
        self._locks = Locks()
        self._catalog: Catalog | None = None
        self._records = Records(Path())
        self._parameters: dict[str, str] = {}

    # --- the run ------------------------------------------------------------------------------

    @hook_impl(trylast=True)
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: Catalog
    ) -> None:
        """Lock what the run writes to, remove what killed runs left, and check what it reads.

        Raises:
            RefusedError: if another run holds a lock, or the files are not whole or do not belong
                together.
        """
        project = Path(run_params["project_path"])
        self._catalog = catalog
        self._records = Records(project / str(catalog.load("params:record_folder")))
        self._parameters = {
            name: digest_of(repr(catalog.load(name)))
            for name in pipeline.inputs()
            # Where things lie does not change what they are.
            if name.startswith("params:") and not name.endswith("_folder")
        }
        self._lock(pipeline, project / str(catalog.load("params:run_folder")))
        try:
            names = sorted(name for name in pipeline.inputs() if self._has_files(name))
            self._require_made(names, pipeline)
            for name in names:
                self._require_whole(name)
            self._require_together(names, pipeline.all_outputs())
        except BaseException:
            self._locks.release()
            raise

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Give the locks back."""
        self._locks.release()

    @hook_impl
    def on_pipeline_error(self, error: Exception, pipeline: Pipeline) -> None:
        """Give the locks back; say what was made by other code, as that may be the cause."""
        self._locks.release()
        if isinstance(error, ToldError | FloatingPointError):
            return
        older: dict[str, str] = {}
        with suppress(UnfitFileError):
            for name in sorted(filter(self._has_files, pipeline.inputs())):
                record = self._records.read(name)
                if record and record.code != _code_of(f"{PIPELINES}.{record.pipeline}.nodes"):
                    older[name] = record.pipeline
        if older:
            log.error(
                "%s were made by another version of the code, which may be the cause of the "
                "error; if so, run %s again",
                ", ".join(older),
                in_words(sorted(set(older.values()))),
            )

    def _lock(self, pipeline: Pipeline, run_folder: Path) -> None:
        writers = [n for n in pipeline.nodes if any(map(self._has_files, n.outputs))]
        paths = {self._records.folder / f"{pipeline_of(node)}.lock" for node in writers}
        # A folder of runs may be that of several jobs.
        runs = {
            run_folder / f"{pipeline_of(node)}.lock"
            for node in writers
            if "params:run_folder" in node.inputs
        }
        try:
            self._locks.take([*paths, *runs])
        except HeldError as error:
            names = ", ".join(sorted({pipeline_of(node) for node in writers}))
            raise RefusedError(
                f"another run writes to what this one writes to ({names} of the job "
                f"{self._records.folder.name}): {error}; wait for its end, or choose another "
                "folder with --params data_folder=…"
            ) from error
        except OSError as error:
            raise RefusedError(
                f"the data folder {self._records.folder} cannot be written ({error.strerror}); "
                "make it writable or choose another with --params data_folder=…"
            ) from error
        folders = {self._records.folder / pipeline_of(node) for node in writers}
        for name in {name for node in writers for name in node.outputs}:
            place = self._place(name)
            if place is not None:
                folders.add(place if place.is_dir() else place.parent)
        orphans = remove_orphans([*folders, *([run_folder] if runs else [])])
        if orphans:
            log.info("removed %d unfinished files that killed runs left", len(orphans))

    # --- datasets -----------------------------------------------------------------------------

    @hook_impl
    def before_dataset_loaded(self, dataset_name: str) -> None:
        """Check that the files of the dataset are whole.

        Raises:
            RefusedError: that names a missing or damaged file.
        """
        if self._has_files(dataset_name):
            self._require_whole(dataset_name)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Check that the inputs of the node belong together.

        Raises:
            RefusedError: that says which pipelines to run.
        """
        self._require_together([name for name in node.inputs if self._has_files(name)], ())

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Keep a record of the dataset's files and of what it was made from."""
        if self._catalog is None or not self._has_files(dataset_name):
            return
        inputs, ancestors = {}, {}
        for name in node.inputs:
            record = self._records.read(name) if self._has_files(name) else None
            if record is not None:
                inputs[name] = record.digest
                ancestors.update(record.ancestors)
        self._records.write(
            Record(
                dataset_name,
                pipeline_of(node),
                node.name,
                files_of(self._catalog.get(dataset_name)),
                {name: self._parameters[name] for name in node.inputs if name in self._parameters},
                _code_of(node.func.__module__),
                inputs,
                {**ancestors, **inputs},
            )
        )

    def _place(self, name: str) -> Path | None:
        return None if self._catalog is None else place_of(self._catalog.get(name))

    def _has_files(self, name: str) -> bool:
        return not name.startswith("params:") and self._place(name) is not None

    def _require_made(self, names: Iterable[str], asked: Pipeline) -> None:
        """Refuse a run whose inputs do not exist, with all pipelines that it lacks."""
        missing = [name for name in names if self._is_missing(name)]
        if not missing:
            return
        graphs = _all_graphs()
        makers = {name: maker for maker, graph in graphs.items() for name in graph.all_outputs()}
        lacking, waiting = set(), [makers[name] for name in missing]
        while waiting:
            maker = waiting.pop()
            lacking.add(maker)
            read = graphs[maker].inputs() - asked.all_outputs()
            waiting += {makers[name] for name in filter(self._is_missing, read)} - lacking
        order = dict.fromkeys(
            pipeline_of(node) for node in sum(graphs.values(), Pipeline([])).nodes
        )
        text = f"{self._place(missing[0])} does not exist"
        if len(missing) > 1:
            others = f"{len(missing) - 1} other{'s' if len(missing) > 2 else ''}"
            text = f"{self._place(missing[0])} and {others} do not exist"
        run = in_words([name for name in order if name in lacking])
        mine = {name for maker in lacking for name in graphs[maker].inputs()} & asked.all_outputs()
        raise RefusedError(f"{text}; run {run}{' as well' if mine else ''}")

    def _is_missing(self, name: str) -> bool:
        place = None if name.startswith("params:") else self._place(name)
        return place is not None and not place.exists()

    def _require_whole(self, name: str) -> None:
        assert self._catalog is not None
        try:
            require_whole(self._catalog.get(name), self._records.read(name))
        except UnfitFileError as error:
            pipeline = _maker_of(name)
            lock = Lock(self._records.folder / f"{pipeline}.lock")
            holder = lock.holder()
            if holder is not None and lock.path not in self._locks.paths:
                raise RefusedError(
                    f"{name} is being written by another run ({holder}); wait for its end"
                ) from error
            raise RefusedError(f"{error}; run the pipeline {pipeline}") from error

    def _require_together(self, names: Iterable[str], remade: Iterable[str]) -> None:
        try:
            require_together(names, self._records, set(remade))
        except UnfitFileError as error:
            raise RefusedError(str(error)) from error


def pipeline_of(node: Node) -> str:
    """The name of the pipeline that a node is part of: the last part of its namespace."""
    return (node.namespace or node.name).rpartition(".")[2]


@lru_cache
def _code_of(module: str) -> str:
    return code_digest(module)


def _maker_of(dataset: str) -> str:
    """The name of the pipeline that makes a dataset; a run by names knows no other pipelines."""
    graphs = _all_graphs().items()
    return next((name for name, graph in graphs if dataset in graph.all_outputs()), "that makes it")


def _all_graphs() -> dict[str, Pipeline]:
    """Every pipeline by its name."""
    names = [module.name for module in iter_modules(pipelines.__path__)]
    return {name: import_module(f"{PIPELINES}.{name}").create_pipeline() for name in names}
