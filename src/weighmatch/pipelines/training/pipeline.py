"""Graph of `training`: only the oracle's branch starts from the truth about OOD."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.training import nodes


def create_pipeline() -> Pipeline:
    """From training sets to checkpoints and logs."""
    return Pipeline(
        [
            Node(
                nodes.train_arms,
                ["training_sets", "params:training", "params:runs", "params:run_folder"],
                ["checkpoints", "training_log"],
                name="train_arms",
            ),
            Node(
                nodes.remove_intruders,
                ["training_sets", "ood_truth"],
                "oracle_sets",
                name="remove_intruders",
            ),
            Node(
                nodes.train_oracle,
                ["oracle_sets", "params:training", "params:runs", "params:run_folder"],
                ["oracle_checkpoints", "oracle_log"],
                name="train_oracle",
            ),
        ]
    )
