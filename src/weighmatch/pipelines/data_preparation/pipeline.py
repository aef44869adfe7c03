"""Graph of `data_preparation`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.data_preparation import nodes


def create_pipeline() -> Pipeline:
    """From scikit-learn's images to splits, truth, manifest and a picture of samples."""
    return Pipeline(
        [
            Node(nodes.load_images, None, ["digits", "photographs"], name="load_images"),
            Node(
                nodes.split_and_contaminate,
                ["digits", "photographs", "params:data"],
                ["training_sets", "evaluation_images", "ood_truth", "test_labels", "manifest"],
                name="split_and_contaminate",
            ),
            Node(
                nodes.draw_samples,
                ["training_sets", "ood_truth"],
                "samples_figure",
                name="draw_samples",
            ),
        ],
        namespace="experiment.data_preparation",
        prefix_datasets_with_namespace=False,
    )
