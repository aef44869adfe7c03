"""Graph of `meta_learning_analysis`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.meta_learning_analysis import nodes


def create_pipeline() -> Pipeline:
    """From the digits to the trainings of the study, their summary and figures."""
    return Pipeline(
        [
            Node(
                nodes.run_meta_learning,
                ["params:meta_learning_analysis", "params:run_folder"],
                ["meta_learning_steps", "influence_quality"],
                name="run_meta_learning",
            ),
            Node(
                nodes.summarise_meta_learning,
                "meta_learning_steps",
                ["meta_learning_runs", "meta_learning_comparison"],
                name="summarise_meta_learning",
            ),
            Node(
                nodes.compare_snapshots,
                "influence_quality",
                "influence_comparison",
                name="compare_snapshots",
            ),
            Node(
                nodes.draw_meta_learning,
                ["meta_learning_steps", "meta_learning_runs", "influence_quality"],
                "meta_learning_figures",
                name="draw_meta_learning",
            ),
        ],
        namespace="meta_learning_analysis",
        prefix_datasets_with_namespace=False,
    )
