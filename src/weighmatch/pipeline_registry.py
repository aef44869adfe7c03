"""The pipelines that `kedro run --pipelines …` knows."""

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline

# One takes as long as all others together, and one needs a folder that is named.
BY_NAME_ONLY = ("meta_learning_analysis", "rank")
DEFAULT = "__default__"


def register_pipelines(study: bool = True) -> dict[str, Pipeline]:
    """Every package below `pipelines`; all of them but those above are the default.

    Args:
        study: whether the study of IHVPs, which is one of digits, is part of the default and of
            the report. Kedro asks for it with the study; for a source whose pool is as it is found
            `hooks.LeavesOutTheStudy` puts the others in their place.
    """
    pipelines = find_pipelines(raise_errors=True)
    if not study and "reporting" in pipelines:
        # Imported here, as a run of other pipelines does not load it.
        from weighmatch.pipelines import reporting

        pipelines["reporting"] = reporting.create_pipeline(study=False)
    left_out = BY_NAME_ONLY if study else (*BY_NAME_ONLY, "ihvp_analysis")
    default = [p for name, p in pipelines.items() if name not in left_out]
    pipelines[DEFAULT] = sum(default, Pipeline([]))
    return pipelines
