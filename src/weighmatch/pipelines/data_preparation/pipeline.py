"""Graph of `data_preparation`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.data_preparation import nodes


def create_pipeline() -> Pipeline:
    """From a source's images to splits, truth, manifest and a picture of samples."""
    return Pipeline(
        [
            Node(
                nodes.load_images,
                ["params:grid", "params:data", "params:cache_folder"],
                "raw_images",
                name="load_images",
            ),
            Node(
                nodes.draw_splits,
                ["raw_images", "params:grid", "params:data"],
                [
                    "training_sets",
                    "evaluation_images",
                    "ood_truth",
                    "test_labels",
                    "manifest",
                    "image_files",
                    "rejected_files",
                ],
                name="draw_splits",
            ),
            Node(
                nodes.draw_samples,
                ["training_sets", "ood_truth"],
                "samples_figure",
                name="draw_samples",
            ),
        ],
        namespace="data_preparation",
        prefix_datasets_with_namespace=False,
    )
