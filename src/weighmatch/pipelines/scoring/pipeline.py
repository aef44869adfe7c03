"""Graph of `scoring`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.scoring import nodes

CHECKPOINTS = ["checkpoints", "oracle_checkpoints"]


def create_pipeline() -> Pipeline:
    """From trained runs to a row a run, predictions, the ranked pool and the exported model."""
    return Pipeline(
        [
            Node(
                nodes.collect_runs,
                [*CHECKPOINTS, "trained_runs", "oracle_runs", "manifest"],
                ["runs", "training_log"],
                name="collect_runs",
            ),
            Node(
                nodes.score_images,
                ["runs", *CHECKPOINTS, "evaluation_images", "features"],
                "predictions",
                name="score_images",
            ),
            Node(
                nodes.describe_pool,
                ["runs", *CHECKPOINTS, "training_sets", "features"],
                "ranked_pool",
                name="describe_pool",
            ),
            Node(
                nodes.export_model,
                ["runs", *CHECKPOINTS, "manifest"],
                "exported_model",
                name="export_model",
            ),
        ],
        namespace="scoring",
        prefix_datasets_with_namespace=False,
    )
