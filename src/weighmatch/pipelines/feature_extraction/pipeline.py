"""Graph of `feature_extraction`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.feature_extraction import nodes


def create_pipeline() -> Pipeline:
    """From images to the features that a frozen backbone gives of them."""
    return Pipeline(
        [
            Node(
                nodes.extract_features,
                ["training_sets", "evaluation_images", "params:training", "params:runs"],
                "features",
                name="extract_features",
            ),
        ],
        namespace="train_and_rank.feature_extraction",
        prefix_datasets_with_namespace=False,
    )
