"""Own images from Python.

from weighmatch import Folder, fit
data = Folder("photos")
run = fit(data)
run.ranking
run.score(images)
run.save("run.pt")
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.arms import LEARNED
from weighmatch.data.cache import default_cache
from weighmatch.data.config import DataConfig, merge_groups
from weighmatch.data.rank_config import Preparation
from weighmatch.data.source import Wishes, get_source
from weighmatch.data.splits import Splits
from weighmatch.evaluation.chosen import files_of
from weighmatch.evaluation.lists import label_next, labels_to_check
from weighmatch.evaluation.ranking import ranking_table
from weighmatch.export import export_run
from weighmatch.semisup.checkpoint import Scored, TrainedRun
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.feature_store import FeatureStore, with_features
from weighmatch.semisup.ranked_pool import describe_pool
from weighmatch.semisup.training.jobs import finish_jobs, plan_jobs, read_job
from weighmatch.streaming import rank_folder

# The first seed of conf/base/parameters_data.yml: from both sides comes the same run.
SEED = 10


@contextmanager
def _script_not_run_again() -> Iterator[None]:
    """Let processes start that do not run the caller's script, which needs no guard then."""
    main: Any = sys.modules["__main__"]
    hidden = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    main.__file__ = main.__spec__ = None
    try:
        yield
    finally:
        for name, value in hidden.items():
            if value is None and name == "__file__":
                del main.__file__
            else:
                setattr(main, name, value)


class Folder:
    """A folder of own images: `labelled/<class>/…` and `unlabelled/…`, or with metadata.csv.

    Attributes:
        config: the parameters of the group `data` that describe it.
    """

    def __init__(self, root: str | Path, **options: Any) -> None:
        """Describe a folder; nothing is read yet.

        Args:
            root: the folder. Nothing in it is moved, changed or deleted.
            options: parameters of the group `data` of this source: `size`, `channels`, `fit`,
                `background`.

        Raises:
            ValueError: if an option is unknown, or the folder has too little in it.
        """
        given = {"seeds": (SEED,), "source": "folder", "root": str(root), **options}
        self.config = DataConfig(**given)
        source = get_source("folder")
        source.check_found(self.config)
        advised = source.recipe(self.config).get("data", {})
        if "size" in advised and given.get("size", "auto") == "auto":
            self.config = DataConfig(**{**given, "size": advised["size"]})

    @cached_property
    def splits(self) -> Splits:
        """All labelled images and the pool; the files are read at the first call."""
        source = get_source("folder")
        with _script_not_run_again():
            raw = source.load_cached(self.config, default_cache() / "images")
        splits = source.draw_all(raw, self.config)
        rejected = [(one.path, one.reason) for one in source.rejected(raw, self.config)]
        self._rejected = pd.DataFrame(rejected, columns=["path", "reason"])
        assert splits is not None
        return splits

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.splits.class_names

    @property
    def files(self) -> pd.DataFrame:
        """A row a file with its split, class and what it is a copy of."""
        return pd.DataFrame({"key": "all", **vars(self.splits.name_files())})

    @property
    def rejected(self) -> pd.DataFrame:
        """The files that are not used: `path` and `reason`."""
        assert self.splits is not None
        return self._rejected

    def __repr__(self) -> str:
        return f"Folder({self.config.parameters()['root']!r})"


@dataclass(frozen=True)
class FittedRun:
    """A run on a folder of own images.

    Attributes:
        trained: the run itself, with its history and log.
        ranking: the pool from the most to the least useful file, see `ranking_table`; none of its
            probabilities is calibrated, as no labelled image was held out.
        label_next: images whose label would help most.
        labels_to_check: labelled images whose label the others contradict.
        preparation: how files became images.
    """

    trained: TrainedRun
    ranking: pd.DataFrame
    label_next: pd.DataFrame
    labels_to_check: pd.DataFrame
    preparation: Preparation

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.trained.class_names

    def score(self, images: NDArray[np.uint8]) -> Scored:
        """Probabilities, scores and weights of any images (n, C, H, W) uint8."""
        return self.trained.score(images)

    def rank(self, root: str | Path, folder: str | Path) -> pd.DataFrame:
        """Rank another folder of images; `folder` gets the ranking and a gallery."""
        with _script_not_run_again():
            rank_folder(self.trained, root, Path(folder), self.preparation)
        return pd.read_parquet(Path(folder) / "ranking.parquet")

    def save(self, path: str | Path) -> None:
        """Write the run to one file `….pt`, or into a folder in all formats (`export_run`)."""
        if Path(path).suffix == ".pt":
            self.trained.save(path)
        else:
            export_run(self.trained, Path(path), preparation=vars(self.preparation))


def fit(
    data: Folder,
    arm: str = LEARNED.name,
    training: Mapping[str, Any] | None = None,
    runs: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> FittedRun:
    """Learn from every labelled image and the pool, and rank the pool; progress is shown.

    Args:
        data: the folder of images.
        arm: the name of the arm to train.
        training: parameters of the group `training`; the others are those of the folder's recipe.
        runs: parameters of the group `runs`, such as `rounds` or `engine`.
        folder: gets checkpoints. A run that lies there finished is read, and one that was
            interrupted goes on. None: in the user's cache folder.

    Raises:
        ValueError: if a parameter is unknown or has a wrong value.
    """
    splits = data.splits
    asked_for = dict(training or {})
    fine_tuned = asked_for.get("fine_tune", "none") != "none"
    wishes = Wishes(asked_for.get("network"), asked_for.get("weights"), fine_tuned)
    recipe: Any = get_source("folder").recipe(data.config, wishes)
    given = merge_groups(recipe["training"], asked_for)
    arrays: Mapping[str, NDArray[Any]] = {
        "labelled_images": splits.labelled_images,
        "labels": splits.labels,
        "unlabelled_images": splits.pool.images,
        "class_names": np.array(splits.class_names, np.str_),
    }
    asked = {**recipe["runs"], **(runs or {}), "arms": (arm,)}
    config, settings = RunsConfig(**asked), TrainingConfig(**given)
    place = default_cache() / "runs" if folder is None else Path(folder)
    sets = {f"folder-all-seed_{SEED:04d}": arrays}
    if settings.frozen:
        features = default_cache() / "features" if folder is None else place / "features"
        with _script_not_run_again():
            FeatureStore.extract(features, sets, {}, settings, config.workers)
        sets = with_features(sets, features)
    (job,) = plan_jobs(config.arms, sets, settings, config)
    finish_jobs([job], place, workers=1, engine=config, processes=config.processes)
    trained = read_job(job, place)
    pool = describe_pool(trained, job.data)
    files = data.files
    return FittedRun(
        trained,
        ranking_table(pool, files[files["split"] == "pool"], None),
        label_next(pool, files_of(files, "all", "pool")),
        labels_to_check(pool, files_of(files, "all", "labelled"), None),
        Preparation.of(data.config.parameters()),
    )
