"""Project settings: https://docs.kedro.org/en/stable/kedro_project_setup/settings.html."""

import warnings
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from weighmatch.data.config import DataConfig, merge_groups
from weighmatch.data.source import Wishes, get_source
from weighmatch.hooks import ChecksBeforeWork, LeavesOutTheStudy
from weighmatch.keeping import KeepsFilesWhole
from weighmatch.semisup.config import RunsConfig
from weighmatch.terminal import TellsProgress

# Parameters by name, and groups of them.
Parameters = dict[str, Any]


class ExperimentLoader(OmegaConfigLoader):
    """Kedro's loader, for environments that change another one.

    Where the globals of an environment say `extends: experiments/benchmark`, its parameters are
    laid over those of that environment instead of those of base. Only `grid.settings` replaces
    the other's as a whole, because its members are the cells of the experiment.
    """

    def __getitem__(self, key: str) -> Parameters:
        """The merged configuration of a kind, such as "parameters"."""
        if key != "parameters" or key in self.data:
            return super().__getitem__(key)
        return _with_recipe(self.read_parameters())

    def read_parameters(self) -> Parameters:
        """The parameters as they are given, without what the source of images recommends."""
        key, other = "parameters", self["globals"].get("extends")
        if other is None:
            return super().__getitem__(key)
        folder = str(Path(self.conf_source) / str(self.env))
        own = self.load_and_merge_dir_config(folder, self.config_patterns[key], key, set())
        loader = OmegaConfigLoader(
            self.conf_source, env=other, runtime_params=self.runtime_params, **CONFIG_LOADER_ARGS
        )
        parameters = loader[key]
        # The other loader's globals, its job among them, must not name the folders of this one.
        self._register_globals_resolver()
        if "settings" in own.get("grid", {}):
            parameters["grid"].pop("settings", None)
        return dict(OmegaConf.to_container(OmegaConf.merge(parameters, own)))  # type: ignore[arg-type]


# kedro-viz 12.5 uses a class of FastAPI that warns of itself wherever it is used.
warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")


def _with_recipe(parameters: Parameters) -> Parameters:
    """The parameters laid over what the source of images recommends."""
    try:
        data = DataConfig(**(parameters.get("data") or {}))
        limit = RunsConfig(time_limit=(parameters.get("runs") or {}).get("time_limit"))
        training = parameters.get("training") or {}
        fine_tuned = training.get("fine_tune", "none") != "none"
        asked = training.get("network"), training.get("weights")
        wishes = Wishes(*asked, fine_tuned, limit.seconds() or None)
        recipe = get_source(data.source).recipe(data, wishes)
    except (TypeError, ValueError):  # the checks of the parameters will say what is wrong
        return parameters
    return {**parameters, **merge_groups(recipe, {k: parameters.get(k) or {} for k in recipe})}


HOOKS = (LeavesOutTheStudy(), ChecksBeforeWork(), KeepsFilesWhole(), TellsProgress())
CONFIG_LOADER_CLASS = ExperimentLoader
# An environment such as conf/gpu changes single parameters and keeps the others.
CONFIG_LOADER_ARGS: Parameters = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},
}
