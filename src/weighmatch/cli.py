"""`kedro run` for this project: Kedro's own, with mistakes in parameters told in a sentence."""

import logging
import re
from dataclasses import fields
from typing import Any

import click
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.cli.utils import CONTEXT_SETTINGS
from kedro.io import DatasetError
from kedro.validation.exceptions import ParameterValidationError

from weighmatch.data.source import UnusableDataError
from weighmatch.hooks import GROUPS, RefusedError
from weighmatch.io.files import UnfitFileError
from weighmatch.workers import WorkerError


@click.group(context_settings=CONTEXT_SETTINGS, name="weighmatch")
def cli() -> None:
    """Commands of this project."""


def _run(**options: Any) -> Any:
    # Kedro logs each failed parameter and then raises them all: once is enough.
    logging.getLogger("kedro.validation").setLevel(logging.CRITICAL)
    try:
        return kedro_run.callback(**options)  # type: ignore[misc]
    except ParameterValidationError as error:
        raise click.ClickException(_in_a_sentence(str(error))) from error
    except (
        RefusedError,
        UnusableDataError,
        UnfitFileError,
        FloatingPointError,
        WorkerError,
    ) as error:
        raise click.ClickException(str(error)) from error
    except DatasetError as error:
        if isinstance(error.__cause__, UnfitFileError):
            raise click.ClickException(str(error.__cause__)) from error
        raise


def _in_a_sentence(message: str) -> str:
    """Kedro's list of failed parameters, without its own prefixes."""
    lines = message.splitlines()
    problems = [line.removeprefix("- ") for line in lines if line.startswith("- ")] or lines
    return "\n".join(_without_prefix(problem) for problem in problems)


def _without_prefix(problem: str) -> str:
    match = re.match(r"Parameter '(\w+)': (?:Failed .*? for parameter '\w+': )?(.*)", problem)
    if match is None or match[1] not in GROUPS:
        return problem
    group, text = match.groups()
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    known = [member.name for member in fields(GROUPS[group])]
    if unknown is not None:
        return f"{group} has no parameter {unknown[1]!r}; it has {', '.join(known)}"
    if text.startswith("Expected dict for dataclass"):
        return f"{group} is a group of parameters; set one of them, such as {group}.{known[0]}"
    missing = re.search(r"missing \d+ required positional arguments?: '(\w+)'", text)
    if missing is not None:
        return f"{group} lacks {missing[1]}; set {group}.{missing[1]}"
    return str(text)


run = click.Command(
    "run", params=kedro_run.params, callback=_run, help="Run the pipelines (kedro run)."
)
cli.add_command(run)
