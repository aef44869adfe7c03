"""Graph of `evaluation`: the one place where predictions and the truth meet."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.evaluation import nodes

PREDICTED = ["runs", "predictions"]


def create_pipeline() -> Pipeline:
    """From predictions and the truth to scores, comparisons and metrics."""
    return Pipeline(
        [
            Node(
                nodes.judge_runs,
                [*PREDICTED, "ood_truth", "test_labels", "manifest"],
                "run_scores",
                name="judge_runs",
            ),
            Node(
                nodes.bin_confidences,
                [*PREDICTED, "test_labels"],
                "calibration",
                name="bin_confidences",
            ),
            Node(
                nodes.trace_weights,
                [*PREDICTED, "ood_truth", "params:training"],
                "weight_trace",
                name="trace_weights",
            ),
            Node(nodes.collect_influences, PREDICTED, "influences", name="collect_influences"),
            Node(
                nodes.compare_arms,
                "run_scores",
                ["arm_table", "comparison"],
                name="compare_arms",
            ),
            Node(
                nodes.summarise,
                ["arm_table", "comparison", "manifest"],
                "metrics",
                name="summarise",
            ),
        ],
        namespace="experiment.evaluation",
        prefix_datasets_with_namespace=False,
    )
