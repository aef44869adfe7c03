"""Graph of `reporting`."""

from collections.abc import Callable

from kedro.pipeline import Node, Pipeline
from matplotlib.figure import Figure

from weighmatch.pipelines.reporting import nodes

# What draws each figure, and from what.
DRAWN: dict[str, tuple[Callable[..., Figure], list[str]]] = {
    "accuracy": (nodes.draw_accuracy, ["run_scores"]),
    "differences": (nodes.draw_differences, ["run_scores", "manifest"]),
    "weights": (nodes.draw_weights, ["weight_trace"]),
    "auroc": (nodes.draw_auroc, ["run_scores"]),
    "calibration": (nodes.draw_calibration, ["calibration"]),
    "compute": (nodes.draw_compute, ["run_scores"]),
    "gap": (nodes.draw_gap, ["comparison"]),
    "gallery": (
        nodes.draw_gallery,
        [
            *("runs", "predictions", "ood_truth", "evaluation_images"),
            *("ranked_pool", "training_sets"),
        ],
    ),
}


STUDY = {"study": "ihvp_comparison", "ihvp_figures": "ihvp_figures"}


def create_pipeline(study: bool = True) -> Pipeline:
    """From tables to figures and the report, with or without the study of IHVPs."""
    drawings = [
        Node(function, inputs, f"{name}_figure", name=f"draw_{name}")
        for name, (function, inputs) in DRAWN.items()
    ]
    report = Node(
        nodes.write_report,
        {
            "metrics": "summary",
            "table": "arm_table",
            "manifest": "manifest",
            "samples": "samples_figure",
            "gallery_page": "gallery_page",
            "exported_model": "exported_model",
            "training": "params:training",
            "runs": "params:runs",
            **{name: f"{name}_figure" for name in DRAWN},
            **(STUDY if study else {}),
        },
        "report",
        name="write_report",
    )
    page = Node(
        nodes.write_gallery,
        ["ranking", "runs", "image_files", "training_sets"],
        "gallery_page",
        name="write_gallery",
    )
    return Pipeline(
        [*drawings, page, report],
        namespace="reporting",
        prefix_datasets_with_namespace=False,
    )
