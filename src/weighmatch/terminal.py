"""What a run says: a line a step with its time, and at the end where the results lie."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from weighmatch.io.provenance import place_of
from weighmatch.keeping import pipeline_of

log = logging.getLogger(__name__)

# What somebody wants to look at after a run, where the run made it.
SHOWN = ("report", "later_ranking", "meta_learning_figures")


class TellsProgress:
    """Logs each node when its outputs are saved, and the verdict when the report is written."""

    def __init__(self) -> None:
        self._steps = 0
        self._done = 0
        self._began = 0.0
        self._node_began = 0.0

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Count the steps of the run."""
        self._steps, self._done = len(pipeline.nodes), 0
        self._began = time.monotonic()

    @hook_impl
    def before_node_run(self) -> None:
        """Start the clock of a step."""
        self._node_began = time.monotonic()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Say that a step is done, when the last of its outputs is saved."""
        if dataset_name != node.outputs[-1]:
            return
        self._done += 1
        name = f"{pipeline_of(node)}: {node.name.rpartition('.')[2]}"
        width = len(str(self._steps))
        seconds = time.monotonic() - self._node_began
        log.info("[%*d/%d] %s, %s", width, self._done, self._steps, name, in_words(seconds))

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol[Any, Any]) -> None:
        """Say how long the run took, where its results lie and what the verdict is."""
        log.info("done in %s", in_words(time.monotonic() - self._began))
        for name in SHOWN:
            if name in pipeline.all_outputs():
                place = place_of(catalog.get(name))
                assert place is not None
                log.info("%s: %s", name.replace("_", " "), _short(place))
        if "report" in pipeline.all_outputs():
            summary = catalog.load("summary")
            log.info("%s", summary["verdict"])
            if summary["time_limit"] is not None:
                log.info("%s", summary["time_limit"])


def in_words(seconds: float) -> str:
    """A time such as `0.4 s`, `12 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _short(place: Path) -> str:
    """A path from the current folder where it lies within, so that it can be clicked or copied."""
    path, here = place.absolute(), Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
