"""Graph of `evaluation`: the one place where predictions and the truth meet."""

from kedro.pipeline import Node, Pipeline

from weighmatch.pipelines.evaluation import nodes

PREDICTED = ["runs", "predictions"]
FILES = ["image_files", "rejected_files"]


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
                ["run_scores", "manifest"],
                ["arm_table", "comparison"],
                name="compare_arms",
            ),
            Node(
                nodes.rank_files,
                ["ranked_pool", *PREDICTED, "test_labels", "image_files"],
                ["ranking", "ranking_csv", "label_next", "labels_to_check"],
                name="rank_files",
            ),
            Node(
                nodes.judge_pile,
                {
                    **{name: name for name in ("run_scores", "manifest", *PREDICTED, *FILES)},
                    "test_labels": "test_labels",
                    "ranking": "ranking",
                    "to_label": "label_next",
                    "to_check": "labels_to_check",
                },
                "pile_verdict",
                name="judge_pile",
            ),
            Node(
                nodes.summarise,
                [
                    *("arm_table", "comparison", "manifest", "pile_verdict", "runs"),
                    *("params:training", "params:runs"),
                ],
                "summary",
                name="summarise",
            ),
            Node(
                nodes.pick_key_numbers,
                ["summary", "influences", "training_log"],
                "metrics",
                name="pick_key_numbers",
            ),
        ],
        namespace="evaluation",
        prefix_datasets_with_namespace=False,
    )
