"""Project settings: https://docs.kedro.org/en/stable/kedro_project_setup/settings.html."""

from weighmatch.hooks import ChecksBeforeWork, LeanStart

HOOKS = (LeanStart(), ChecksBeforeWork())

# An environment such as conf/gpu changes single parameters and keeps the others.
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},
}
