"""Nodes of `reporting`."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from weighmatch.arms import get_arm
from weighmatch.evaluation import figures, gallery, gallery_page, report
from weighmatch.evaluation.chosen import choose_run, paths_of
from weighmatch.evaluation.judging import Arrays, Predictions
from weighmatch.evaluation.origin import find_origin
from weighmatch.semisup.config import RunsConfig, TrainingConfig


def draw_accuracy(run_scores: pd.DataFrame) -> Figure:
    """Test accuracy of each arm."""
    return figures.draw_accuracy(run_scores)


def draw_differences(run_scores: pd.DataFrame, manifest: report.Row) -> Figure:
    """Each arm against the rival of the declared comparison, on the same seed."""
    return figures.draw_differences(run_scores, get_arm(manifest["primary"]["against"]))


def draw_weights(weight_trace: pd.DataFrame) -> Figure:
    """Mean weight of each kind of image through training."""
    return figures.draw_weights(weight_trace)


def draw_auroc(run_scores: pd.DataFrame) -> Figure:
    """What tells held-out OOD images apart."""
    return figures.draw_auroc(run_scores)


def draw_calibration(calibration: pd.DataFrame) -> Figure:
    """Reliability diagram."""
    return figures.draw_calibration(calibration)


def draw_compute(run_scores: pd.DataFrame) -> Figure:
    """Accuracy against compute."""
    return figures.draw_compute(run_scores)


def draw_gap(comparison: pd.DataFrame) -> Figure:
    """How much of the oracle's gap is closed."""
    return figures.draw_gap(comparison)


def draw_gallery(
    runs: pd.DataFrame,
    predictions: Predictions,
    ood_truth: dict[str, Arrays],
    evaluation_images: dict[str, Arrays],
    ranked_pool: Arrays,
    training_sets: dict[str, Arrays],
) -> Figure:
    """Held-out images that one run weighs up and down most, or else images of its pool."""
    run = choose_run(runs)
    if "heldout_images" in evaluation_images.get(run["key"], {}):
        return gallery.draw_gallery(runs, predictions, ood_truth, evaluation_images)
    found = {f"heldout_{name}": ranked_pool[name] for name in ("scores", "weights")}
    images = {"heldout_images": training_sets[run["key"]]["unlabelled_images"]}
    return gallery.draw_gallery(runs, {run["run"]: lambda: found}, {}, {run["key"]: images})


def write_gallery(
    ranking: pd.DataFrame,
    runs: pd.DataFrame,
    image_files: pd.DataFrame,
    training_sets: dict[str, Arrays],
) -> str:
    """A page with the images of the pool that rank highest and lowest."""
    key = choose_run(runs)["key"]
    images = training_sets[key]["unlabelled_images"]
    place = {path: k for k, path in enumerate(paths_of(image_files, key, "pool"))}
    shown = ranking[ranking["near_duplicate_of"] == ""].reset_index(drop=True)
    return gallery_page.render_gallery(shown, lambda row: images[place[shown["path"][row]]])


def write_report(
    metrics: report.Row,
    table: pd.DataFrame,
    manifest: report.Row,
    gallery_page: str,
    exported_model: Path,
    training: TrainingConfig,
    runs: RunsConfig,
    study: pd.DataFrame | None = None,
    ihvp_figures: dict[str, bytes] | None = None,
    **drawn: bytes,
) -> str:
    """One self-contained page, which names the gallery and the files of the model."""
    shown = drawn if ihvp_figures is None else {**drawn, "ihvp": ihvp_figures["summary"]}
    groups = {"training": asdict(training), "runs": asdict(runs)}
    parameters = {"data": manifest["parameters"], **groups}
    sizes = {path.name: path.stat().st_size for path in sorted(exported_model.iterdir())}
    sizes |= {"gallery.html": len(gallery_page.encode())}
    return report.render_report(
        metrics,
        table,
        study,
        manifest,
        shown,
        sizes,
        parameters,
        find_origin(),
        frozen=training.frozen,
    )
