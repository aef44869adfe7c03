"""Graph of `rank`: it is run by name only, with `--params rank.images=DIR`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.rank import nodes


def create_pipeline() -> Pipeline:
    """From the exported model to a ranking of other images."""
    return Pipeline(
        [
            Node(
                nodes.rank_images,
                ["exported_model", "pile_verdict", "params:rank"],
                "later_ranking",
                name="rank_images",
            )
        ],
        namespace="rank",
        prefix_datasets_with_namespace=False,
    )
