"""The commands of this project: Kedro's own, with mistakes told in a sentence."""

import errno
import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import yaml  # type: ignore[import-untyped]
from kedro.framework.cli.jupyter import jupyter as kedro_jupyter
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.cli.utils import CONTEXT_SETTINGS, KedroCliError
from kedro.framework.project import LOGGING
from kedro.utils import find_config_file
from kedro.validation.exceptions import ParameterValidationError
from kedro_viz.launchers.cli.main import viz  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from weighmatch.checks import ToldError, lacks
from weighmatch.hooks import GROUPS
from weighmatch.mistakes import require_known, require_project
from weighmatch.semisup.training.dividing import LAUNCHED

# What the operating system says that no change of this program cures.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
# A parameter with its value. Commas within a value in quotes or within a list separate nothing.
PARAMETER = re.compile(r"""[^=,]*=\s*(?:"[^"]*"|'[^']*')\s*(?=,|$)|(?:\[[^\]]*\]|[^,])+""")
INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended


@click.group(context_settings=CONTEXT_SETTINGS, name="weighmatch")
def cli() -> None:
    """Commands of this project."""


def _run(*, show_traceback: bool, **options: Any) -> Any:
    # Kedro logs each failed parameter and then raises them all: once is enough.
    logging.getLogger("kedro.validation").setLevel(logging.CRITICAL)
    try:
        project = require_project()
        _configure_logging(project)
        require_known(options, project)
        with _under_torchrun() as leads:
            return kedro_run.callback(**options) if leads else None  # type: ignore[misc]
    except KeyboardInterrupt as stopped:
        notes = getattr(stopped, "__notes__", [])
        text = "Interrupted; start the same command again, and it goes on from what is finished"
        click.echo("\n" + ". ".join([text, *notes]) + ".", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from stopped
    except Exception as error:
        sentence = _sentence_of(error)
        if sentence is None:
            raise
        if show_traceback:
            traceback.print_exception(error)
        raise click.ClickException(sentence) from error


def _under_torchrun() -> AbstractContextManager[bool]:
    """Whether this process runs the pipelines: of those that torchrun starts the first one does."""
    if LAUNCHED not in os.environ:
        return nullcontext(True)
    from weighmatch.semisup.training.processes import launched

    return launched()


def _configure_logging(project: Path) -> None:
    """Log as the project says: Kedro looks for its file in the current folder alone."""
    if find_config_file("conf/logging") is None and "KEDRO_LOGGING_CONFIG" not in os.environ:
        text = (project / "conf" / "logging.yml").read_text("utf-8")
        LOGGING.configure(yaml.safe_load(text))
        LOGGING.set_project_logging(__package__)


def _sentence_of(error: Exception) -> str | None:
    """What the user is told of an error; None of one that only its traceback explains."""
    if isinstance(error, ParameterValidationError):
        return _in_a_sentence(str(error))
    for cause in _causes(error):
        if isinstance(cause, ToldError | FloatingPointError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            place = f"{cause.filename}: " if cause.filename else ""
            return (
                f"{place}{cause.strerror}; make room or make the folder writable, and start "
                "again: what is finished is kept"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: Kedro wraps what a dataset raises."""
    while error is not None:
        yield error
        error = error.__cause__


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
        return lacks(group, [unknown[1]], known)
    if text.startswith("Expected dict for dataclass"):
        return f"{group} is a group of parameters; set one of them, such as {group}.{known[0]}"
    missing = re.search(r"missing \d+ required positional arguments?: '(\w+)'", text)
    if missing is not None:
        return f"{group} lacks {missing[1]}; set {group}.{missing[1]}"
    return str(text)


def _split_params(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Kedro's own reading of `--params`, for lists, quotes and spaces too."""
    if isinstance(value, dict):  # from --config
        return value
    given, name = [], ""
    for part in filter(None, map(str.strip, PARAMETER.findall(value))):
        if not re.match(r"[^=\s]+\s*=", part):
            raise click.BadParameter(
                f"{part!r} is not of the form name=value, as in data.ratio=0.5{_with_comma(name)}"
            )
        name, text = map(str.strip, part.split("=", 1))
        given.append(f"{name}={text}")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(given))
    except yaml.YAMLError as error:
        raise click.BadParameter(f"{value!r} holds a value that cannot be read") from error


def _with_comma(name: str) -> str:
    """What cures a value with a comma, which was cut there."""
    if not name:
        return ""
    return (
        f"; if the comma belongs to the value of {name}, a list has brackets and a text has quotes "
        f"of its own: --params '{name}=[…]' or --params '{name}=\"…\"'"
    )


def _own_params() -> list[click.Parameter]:
    """The options of `kedro run`, with lists in `--params` and a flag that shows tracebacks."""
    options = list(kedro_run.params)
    place = next(n for n, option in enumerate(options) if option.name == "params")
    options[place] = click.Option(
        ["--params"],
        type=click.UNPROCESSED,
        default="",
        callback=_split_params,
        help="Parameters to change, such as data.ratio=0.5,data.seeds=[1,2]; quote a list.",
    )
    flag = ["--traceback", "show_traceback"]
    shown = click.Option(flag, is_flag=True, help="Show where in the code an error comes from.")
    return [*options, shown]


run = click.Command("run", params=_own_params(), callback=_run, help="Run the pipelines.")
cli.add_command(run)


class _Jupyter(click.Group):
    """Kedro's command, which names a file of requirements that this project has not."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KedroCliError as error:
            raise click.ClickException(
                "Jupyter is not part of this project; start it with "
                "uv run --with jupyterlab --with notebook kedro jupyter lab"
            ) from error


cli.add_command(_Jupyter("jupyter", kedro_jupyter.commands, help=kedro_jupyter.help))

# kedro-viz is a global command, which no command of a project replaces; its table is open.
viz.lazy_subcommands["run"] = "weighmatch.graph.run"
