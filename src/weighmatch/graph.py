"""`kedro viz run` for this project: Kedro's own, opened on the steps alone."""

import os
import webbrowser
from typing import Any

import click
from kedro_viz.launchers.cli import run as started  # type: ignore[import-untyped]

# Leaves the boxes of the pipelines, and hides the data sets between them until they are asked for.
STEPS = "?types=nodes"


def _run(*, host: str, browser: bool, **options: Any) -> None:
    # Its server is a process that warns of a class of FastAPI before it reads the settings.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:ORJSONResponse is deprecated")
    started.run.callback(host=host, browser=False, **options)
    for port in started._VIZ_PROCESSES:  # the port that was free; none if nothing was started
        page = f"http://{host}:{port}/{STEPS}"
        click.echo(f"With the steps alone it is at \n {page}")
        if browser:
            webbrowser.open_new(page)


run = click.Command("run", params=started.run.params, callback=_run, help=started.run.help)
