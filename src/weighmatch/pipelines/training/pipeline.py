"""Graph of `training`: only the oracle's branch starts from the truth about OOD."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.training import nodes

PARAMETERS = ["params:training", "params:runs", "params:run_folder"]


def create_pipeline() -> Pipeline:
    """From training sets to trained runs, one file each."""
    return Pipeline(
        [
            Node(
                nodes.train_arms,
                ["training_sets", "features", *PARAMETERS],
                ["checkpoints", "trained_runs"],
                name="train_arms",
            ),
            Node(
                nodes.find_useful,
                "ood_truth",
                "oracle_sets",
                name="find_useful",
            ),
            Node(
                nodes.train_oracle,
                ["oracle_sets", "training_sets", "features", "trained_runs", *PARAMETERS],
                ["oracle_checkpoints", "oracle_runs"],
                name="train_oracle",
            ),
        ],
        namespace="training",
        prefix_datasets_with_namespace=False,
    )
