"""Graph of `ihvp_analysis`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.ihvp_analysis import nodes


def create_pipeline() -> Pipeline:
    """From the digits to the comparison of IHVP methods and its figures."""
    return Pipeline(
        [
            Node(
                nodes.compare_ihvps,
                "params:ihvp_analysis",
                ["ihvp_comparison", "ihvp_spectra"],
                name="compare_ihvps",
            ),
            Node(
                nodes.measure_memory, "params:ihvp_analysis", "ihvp_memory", name="measure_memory"
            ),
            Node(
                nodes.draw_ihvps,
                ["ihvp_comparison", "ihvp_spectra", "ihvp_memory"],
                [
                    "ihvp_figure",
                    "ihvp_progress_figure",
                    "ihvp_stability_figure",
                    "ihvp_spectra_figure",
                    "ihvp_memory_figure",
                ],
                name="draw_ihvps",
            ),
        ]
    )
