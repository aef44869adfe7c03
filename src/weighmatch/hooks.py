"""What is checked before a run starts, beyond what each group of parameters checks of itself."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol, memory_dataset
from kedro.pipeline import Pipeline

Catalog = CatalogProtocol[Any, Any]

# The groups of conf/base/parameters_*.yml, and the folder that the catalog asks for.
GROUPS = (
    "data",
    "training",
    "runs",
    "benchmark",
    "ihvp_analysis",
    "meta_learning_analysis",
    "run_folder",
    "data_folder",
)


# What makes a run one of a part of the pipelines, as one that goes on after an error.
PARTS = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs")


class RefusedError(ValueError):
    """A run that cannot be done as asked: one sentence that names the parameter and the cure."""


class LeanStart:
    """Keeps Kedro from importing pandas for every parameter: half of a start's time.

    Kedro asks pandas whether a value that it keeps in memory is a data frame. A value whose own
    class does not come from one of these packages is none.
    """

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        """Ask only where the answer can be yes."""
        infer = getattr(memory_dataset, "_infer_copy_mode", None)
        if infer is None or getattr(infer, "lean", False):
            return

        def lean(data: Any) -> Any:
            package = type(data).__module__.partition(".")[0]
            plain = package in ("builtins", "weighmatch", "pathlib", "omegaconf")
            return "deepcopy" if plain else infer(data)

        lean.lean = True  # type: ignore[attr-defined]
        memory_dataset._infer_copy_mode = lean


class ChecksBeforeWork:
    """Refuses to start work that could not be finished, or that was not asked for."""

    @hook_impl
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: Catalog
    ) -> None:
        """Check runtime parameters, parameters that depend on one another, and folders.

        Raises:
            RefusedError: saying what to change.
        """
        given = run_params.get("runtime_params") or {}
        _check_groups(given)
        inputs = pipeline.inputs()
        if not any(run_params.get(part) for part in PARTS):
            _check_effect(given, inputs)
        if "params:benchmark" in inputs:
            alone = all(name.startswith("benchmark") for name in pipeline.all_outputs())
            _check_benchmark(catalog, given if alone else {})
        elif "params:training" in inputs and "params:runs" in inputs:
            data = catalog.load("params:data")
            # Kedro makes it a DataConfig only where a node of this run takes it.
            labels = data["labels_per_class"] if isinstance(data, dict) else data.labels_per_class
            training = catalog.load("params:training")
            _check_training(training, labels)
            _check_rounds(catalog.load("params:runs"), training)
        folders = {_folder_of(catalog, name) for name in pipeline.all_outputs()}
        if "params:run_folder" in inputs:
            # As catalog paths: from the project's folder, wherever the command was given.
            folder = Path(run_params["project_path"]) / str(catalog.load("params:run_folder"))
            catalog["params:run_folder"] = str(folder)
            folders.add(folder)
        for folder in sorted(folder for folder in folders if folder is not None):
            _check_writable(folder)


def _check_groups(given: dict[str, Any]) -> None:
    unknown = sorted(set(given) - set(GROUPS))
    if unknown:
        raise RefusedError(
            f"there is no parameter {', '.join(unknown)}; --params takes names such as data.ratio, "
            f"from the groups {', '.join(GROUPS)}"
        )


def _check_effect(given: dict[str, Any], inputs: set[str]) -> None:
    for group in GROUPS:
        if group in given and f"params:{group}" not in inputs and isinstance(given[group], dict):
            name = next(iter(given[group]), "")
            raise RefusedError(
                f"{group}.{name} has no effect on the pipelines of this run; leave it out, or add "
                "the pipeline that reads it (data_preparation for data) to --pipelines"
            )


def _check_benchmark(catalog: Catalog, given: dict[str, Any]) -> None:
    from weighmatch.semisup.config import TrainingConfig
    from weighmatch.studies.benchmark_config import make_cells, make_training, require_effect

    benchmark = catalog.load("params:benchmark")
    data, training = (catalog.load(f"params:{name}") for name in ("data", "training"))
    # Kedro makes it a TrainingConfig only where a node of this run takes it.
    if isinstance(training, dict):
        training = TrainingConfig(**training)
    try:
        require_effect(benchmark, given)
        cells = make_cells(benchmark, data)
        training = make_training(benchmark, training)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    _check_training(training, min(cell.data.labels_per_class for cell in cells))


def _check_rounds(runs: Any, training: Any) -> None:
    from weighmatch.semisup.config import schedules

    rounds = max(max(schedules(arm, (runs.stages,)), default=1) for arm in runs.arms)
    if rounds > max(2, training.steps):
        raise RefusedError(
            f"runs.stages {runs.stages} are more rounds than there are steps ({training.steps}); "
            "lower them or raise training.steps"
        )


def _check_training(training: Any, labels_per_class: int) -> None:
    if training.device == "cuda":
        from weighmatch.semisup.trainer import pick_device

        try:
            pick_device(training.device)
        except ValueError as error:
            raise RefusedError(str(error)) from error
    if training.weighing.outer_labels == "held_out" and labels_per_class < 2:
        raise RefusedError(
            "training.weighing.outer_labels: held_out needs data.labels_per_class of at least 2 "
            "(in the benchmark: benchmark.labels_per_class, or that of its source); raise it or "
            "set outer_labels to training"
        )


def _folder_of(catalog: Catalog, name: str) -> Path | None:
    dataset = catalog.get(name)
    description = dataset._describe() if dataset is not None else {}
    if "filepath" in description:
        return Path(description["filepath"]).parent
    return Path(description["path"]) if "path" in description else None


def _check_writable(folder: Path) -> None:
    # Left behind by a run that is killed, an empty folder would look like a result.
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        for place in missing:
            place.rmdir()
    except OSError as error:
        raise RefusedError(
            f"the data folder {folder} cannot be written ({error.strerror}); make it writable or "
            f"choose another with --params data_folder=…"
        ) from error
