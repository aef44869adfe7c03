"""Graph of `reporting`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.reporting import nodes

FIGURES = ("accuracy", "differences", "weights", "auroc", "calibration", "gallery")


def create_pipeline() -> Pipeline:
    """From tables to figures and the report."""
    drawings = [
        Node(nodes.draw_accuracy, "run_scores", "accuracy_figure", name="draw_accuracy"),
        Node(nodes.draw_differences, "run_scores", "differences_figure", name="draw_differences"),
        Node(nodes.draw_weights, "weight_trace", "weights_figure", name="draw_weights"),
        Node(nodes.draw_auroc, "run_scores", "auroc_figure", name="draw_auroc"),
        Node(nodes.draw_calibration, "calibration", "calibration_figure", name="draw_calibration"),
        Node(
            nodes.draw_gallery,
            ["judgements", "evaluation_images"],
            "gallery_figure",
            name="draw_gallery",
        ),
    ]
    report = Node(
        nodes.write_report,
        {
            "metrics": "metrics",
            "comparison": "comparison",
            "study": "ihvp_comparison",
            "manifest": "manifest",
            "samples": "samples_figure",
            "ihvp": "ihvp_figure",
            **{name: f"{name}_figure" for name in FIGURES},
        },
        "report",
        name="write_report",
    )
    return Pipeline([*drawings, report])
