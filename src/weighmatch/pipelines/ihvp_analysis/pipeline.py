"""Graph of `ihvp_analysis`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.ihvp_analysis import nodes


def create_pipeline() -> Pipeline:
    """From training sets to the comparison of IHVP methods and its figure."""
    return Pipeline(
        [
            Node(
                nodes.compare_ihvps,
                ["training_sets", "params:ihvp_analysis"],
                "ihvp_comparison",
                name="compare_ihvps",
            ),
            Node(nodes.draw_ihvps, "ihvp_comparison", "ihvp_figure", name="draw_ihvps"),
        ]
    )
