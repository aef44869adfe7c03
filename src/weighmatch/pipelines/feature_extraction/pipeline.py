"""Graph of `feature_extraction`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.feature_extraction import nodes


def create_pipeline() -> Pipeline:
    """From images to the features that a frozen backbone gives of them, and a first ranking."""
    return Pipeline(
        [
            Node(
                nodes.extract_features,
                ["training_sets", "evaluation_images", "params:training", "params:runs"],
                "features",
                name="extract_features",
            ),
            Node(
                nodes.write_early_ranking,
                ["training_sets", "features", "image_files"],
                "early_ranking",
                name="write_early_ranking",
            ),
        ],
        namespace="feature_extraction",
        prefix_datasets_with_namespace=False,
    )
