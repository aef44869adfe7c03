"""Graph of `evaluation`."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.evaluation import nodes


def create_pipeline() -> Pipeline:
    """From predictions and the truth to scores, comparisons and metrics."""
    return Pipeline(
        [
            Node(
                nodes.join_truth,
                ["predictions", "ood_truth", "test_labels"],
                "judgements",
                name="join_truth",
            ),
            Node(
                nodes.score_runs,
                ["runs", "judgements", "manifest"],
                "run_scores",
                name="score_runs",
            ),
            Node(nodes.bin_confidences, "judgements", "calibration", name="bin_confidences"),
            Node(
                nodes.trace_weights,
                ["pool_weights", "ood_truth", "params:training"],
                "weight_trace",
                name="trace_weights",
            ),
            Node(nodes.compare_arms, "run_scores", "comparison", name="compare_arms"),
            Node(
                nodes.summarise,
                ["comparison", "run_scores", "manifest"],
                "metrics",
                name="summarise",
            ),
        ]
    )
