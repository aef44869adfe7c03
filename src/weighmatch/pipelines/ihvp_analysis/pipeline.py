"""Graph of `ihvp_analysis`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.ihvp_analysis import nodes

TABLES = ["ihvp_comparison", "ihvp_spectra", "ihvp_memory"]


def create_pipeline() -> Pipeline:
    """From the digits to the comparison of IHVP methods and its figures."""
    return Pipeline(
        [
            Node(
                nodes.compare_ihvps,
                ["params:ihvp_analysis", "params:run_folder"],
                TABLES[:2],
                name="compare_ihvps",
            ),
            Node(nodes.measure_memory, "params:ihvp_analysis", TABLES[2], name="measure_memory"),
            Node(nodes.draw_ihvps, TABLES, "ihvp_figures", name="draw_ihvps"),
        ],
        namespace="ihvp_analysis",
        prefix_datasets_with_namespace=False,
    )
