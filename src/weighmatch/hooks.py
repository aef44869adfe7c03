"""What is checked before a run starts, beyond what each group of parameters checks of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from weighmatch.arms import get_arm
from weighmatch.checks import ToldError, require_group
from weighmatch.data import grid
from weighmatch.data.config import DataConfig
from weighmatch.data.rank_config import RankConfig
from weighmatch.data.source import all_sources, get_source
from weighmatch.extras import family_of, require_file
from weighmatch.pipeline_registry import register_pipelines
from weighmatch.ray_engine import make_engine
from weighmatch.semisup.config import RunsConfig, TrainingConfig, require_effect
from weighmatch.semisup.training.deadline import CLOCK
from weighmatch.semisup.training.dividing import count_processes, require_divisible
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.meta_config import MetaLearningConfig

Catalog = CatalogProtocol[Any, Any]
Given = Mapping[str, Any]

# The groups of parameters, each with the dataclass that holds its defaults.
GROUPS: dict[str, type] = {
    "data": DataConfig,
    "grid": grid.GridConfig,
    "training": TrainingConfig,
    "runs": RunsConfig,
    "rank": RankConfig,
    "ihvp_analysis": StudyConfig,
    "meta_learning_analysis": MetaLearningConfig,
}
KNOWN = (*GROUPS, "run_folder", "cache_folder", "data_folder")
# What makes a run one of a part of the pipelines, as one that goes on after an error.
PARTS = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs")


class RefusedError(ToldError, ValueError):
    """A run that cannot be done as asked: one sentence that names the parameter and the cure."""


@dataclass(frozen=True)
class Asked:
    """The parameters that decide together what is trained on what."""

    data: DataConfig
    grid: grid.GridConfig
    training: TrainingConfig
    runs: RunsConfig


class LeavesOutTheStudy:
    """Own images are ranked without the study of IHVPs on digits, which `--pipelines` still runs.

    The registry of pipelines knows no parameters, so that it is told here.
    """

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        """Register the pipelines that fit the source of images."""
        data = context.config_loader.read_parameters().get("data")
        found = {one.name for one in all_sources() if not one.contaminates}
        study = not isinstance(data, dict) or data.get("source") not in found
        for name, pipeline in register_pipelines(study).items():
            pipelines[name] = pipeline


class ChecksBeforeWork:
    """Refuses to start work that could not be finished, or that was not asked for."""

    @hook_impl
    def before_pipeline_run(self, run_params: Given, pipeline: Pipeline, catalog: Catalog) -> None:
        """Check runtime parameters, parameters that depend on one another, and folders.

        A time limit counts from here.

        Raises:
            RefusedError: saying what to change.
        """
        CLOCK.start()
        given = run_params.get("runtime_params") or {}
        inputs = pipeline.inputs()
        # The evaluation reads their time limit alone.
        trains = {"params:runs", "params:run_folder"} <= inputs
        _check_groups(given)
        if not any(run_params.get(part) for part in PARTS):
            _check_pipelines(given, inputs)
        try:
            asked = _read(catalog)
            if "params:data" in inputs:
                grid.require_effect(given.get("data", {}), asked.grid, asked.data)
            source = get_source(asked.data.source)
            if "params:cache_folder" in inputs:
                source.check_found(asked.data)
            if "params:training" in inputs:
                source.recipe(asked.data)  # otherwise settings would silently be others
                _check_network(asked.training)
            if trains:
                _check_runs(given, asked)
            if "params:rank" in inputs:
                require_group("rank", catalog.load("params:rank"), RankConfig).require_folder()
        except ValueError as error:
            raise RefusedError(str(error)) from error
        folders = {_folder_of(catalog, name) for name in pipeline.all_outputs()}
        for name in {"params:run_folder", "params:cache_folder"} & inputs:
            # As catalog paths: from the project's folder, wherever the command was given.
            folder = Path(run_params["project_path"]) / str(catalog.load(name))
            catalog.save(name, str(folder))
            folders.add(folder)
        for folder in sorted(folder for folder in folders if folder is not None):
            _check_writable(folder)
        # Last, as a cluster is started for it.
        if trains:
            make_engine(asked.runs).prepare()
        if "params:rank" in inputs:
            make_engine(require_group("rank", catalog.load("params:rank"), RankConfig)).prepare()


def _check_groups(given: Given) -> None:
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise RefusedError(
            f"there is no parameter {', '.join(unknown)}; --params takes names such as data.ratio, "
            f"from the groups {', '.join(KNOWN)}"
        )


def _check_pipelines(given: Given, inputs: set[str]) -> None:
    """Refuse a parameter that no pipeline of this run reads."""
    for group in GROUPS:
        if group in given and f"params:{group}" not in inputs and isinstance(given[group], dict):
            name = next(iter(given[group]), "")
            raise RefusedError(
                f"{group}.{name} has no effect on the pipelines of this run; leave it out, or add "
                "the pipeline that reads it (data_preparation for data) to --pipelines"
            )


def _read(catalog: Catalog) -> Asked:
    """The groups as dataclasses, which Kedro makes of them only where a node of this run does."""
    data = catalog.load("params:data")
    return Asked(
        data if isinstance(data, DataConfig) else DataConfig(**data),
        require_group("grid", catalog.load("params:grid"), grid.GridConfig),
        require_group("training", catalog.load("params:training"), TrainingConfig),
        require_group("runs", catalog.load("params:runs"), RunsConfig),
    )


def _check_network(training: TrainingConfig) -> None:
    """Refuse a network or a file of weights that is not there."""
    require_file(training.weights)
    family = family_of(training.network)
    # To look a name up imports torch, which a run of the defaults does not need yet.
    if training.network != TrainingConfig.network and family in (None, "torchvision"):
        from weighmatch.semisup.parts.networks import require_network

        require_network(training.network)


def _check_runs(given: Given, asked: Asked) -> None:
    """Refuse runs that could not be trained, and parameters that none of them reads."""
    training, runs = asked.training, asked.runs
    require_effect(given.get("training", {}), runs.arms, runs)
    if given.get("training", {}).get("features") and not training.frozen:
        raise ValueError(
            "training.features has no effect, as no backbone is frozen; leave it out, or set "
            "training.network=efficientnet_lite0 and training.weights=packaged"
        )
    trained = [(a, s) for a in runs.arms for s in get_arm(a).schedules_among(runs.schedule)]
    schedules = {schedule for _, schedule in trained}
    count = count_processes(runs.processes)
    require_divisible(count, training, trained, limited=runs.time_limit is not None)
    if "rounds" not in schedules and "rounds" in given.get("runs", {}):
        raise ValueError(
            "runs.rounds has no effect without an arm that is trained in rounds; leave it out, or "
            "add rounds to runs.schedule and such an arm to runs.arms"
        )
    if "rounds" in schedules and runs.rounds > training.steps:
        raise ValueError(
            f"runs.rounds {runs.rounds} are more rounds than there are steps ({training.steps}); "
            "lower them or raise training.steps"
        )
    if training.device == "cuda":
        from weighmatch.semisup.training.config import pick_device

        pick_device(training.device)
    cells = grid.make_cells(asked.grid, asked.data)
    fewest = min(cell.data.labels_per_class for cell in cells)
    held_out = training.weighting.outer_labels == "held_out"
    if held_out and fewest < 2 and schedules & {"online", "two_stages"}:
        raise ValueError(
            "training.weighting.outer_labels: held_out needs data.labels_per_class of at least 2; "
            "raise it or set outer_labels to training"
        )


def _folder_of(catalog: Catalog, name: str) -> Path | None:
    dataset = catalog.get(name)
    description = dataset._describe() if dataset is not None else {}
    if "filepath" in description:
        return Path(description["filepath"]).parent
    return Path(description["path"]) if "path" in description else None


def _check_writable(folder: Path) -> None:
    # No folder is made here: one that a killed run leaves behind would look like a result.
    place = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RefusedError(
            f"the data folder {folder} cannot be written ({error.strerror}); make it writable or "
            f"choose another with --params data_folder=…"
        ) from error
