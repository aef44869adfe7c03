"""The pipelines that `kedro run --pipelines …` knows."""

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline

# One takes as long as all others together, and one needs a folder that is named.
BY_NAME_ONLY = ("meta_learning_analysis", "rank")
DEFAULT = "__default__"


def register_pipelines() -> dict[str, Pipeline]:
    """Every package below `pipelines`; all of them but those above are the default."""
    pipelines = find_pipelines(raise_errors=True)
    default = [p for name, p in pipelines.items() if name not in BY_NAME_ONLY]
    pipelines[DEFAULT] = sum(default, Pipeline([]))
    return pipelines
