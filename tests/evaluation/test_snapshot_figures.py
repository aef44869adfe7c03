import itertools
import math

import pandas as pd
import pytest

from weighmatch.evaluation.snapshot_figures import draw_influence


def table(seeds=(0, 1), stages=(0.1, 1.0), scores=("dot", "cosine")):
    lines = [(ratio, solver) for ratio in (0.0, 0.1, 1.0) for solver in ("exact", "cg10")]
    lines.append((math.inf, "identity"))
    return pd.DataFrame(
        {
            "seed": seed,
            "stage": stage,
            "damping_ratio": ratio,
            "solver": solver,
            "score": score,
            "auroc": 0.6 + 0.1 * seed + 0.01 * (solver == "cg10"),
            "accuracy_test_seen": 60 + 20 * stage + 10 * seed,
            "auroc_confidence": 0.5,
        }
        for seed, stage, score, (ratio, solver) in itertools.product(seeds, stages, scores, lines)
    )


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_a_line_a_stage_and_solver_ends_without_curvature():
    figure = draw_influence(table())
    figure.canvas.draw()
    assert [axes.get_title(loc="left")[:9] for axes in figure.axes] == ["Influence", "Influence"]
    for axes in figure.axes:
        found = lines_of(axes)
        exact = found["100 % of training (accuracy 85 %), exact"]
        near = found["100 % of training (accuracy 85 %), CG, 10 products"]
        assert exact.get_linestyle() == "-"
        assert near.get_linestyle() == "--"
        assert exact.get_color() == near.get_color()
        assert exact.get_ydata() == pytest.approx([0.65] * 4)
        assert near.get_ydata() == pytest.approx([0.66] * 3 + [0.65])
        # Two stages stand .08 apart at each damping.
        assert exact.get_xdata() == pytest.approx([-1.96, -0.96, 0.04, 1.04])
        confidence = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert [list(line.get_ydata()) for line in confidence] == [[0.5, 0.5]] * 2
        # The 95 % t interval of two seeds that lie .1 apart: a vertical bar a damping.
        bars = [line for line in axes.get_lines() if line.get_alpha() == 0.6]
        assert len(bars) == 8
        for bar in bars:
            assert bar.get_xdata()[0] == bar.get_xdata()[1]
            assert list(bar.get_ydata()) == pytest.approx(
                [0.65 - 0.63531, 0.65 + 0.63531], abs=1e-5
            )
        ticks = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
        assert ticks == ["weight decay only", "0.1", "1", "no curvature"]
        assert list(axes.get_xticks()) == [-2, -1, 0, 1]
    shown = figure.get_suptitle()
    assert "2 seeds" in shown
    assert "95 % interval" in shown


def test_a_single_seed_has_no_interval():
    one, two = draw_influence(table(seeds=(0,))), draw_influence(table())
    assert "interval" not in one.get_suptitle()
    assert one.get_suptitle().endswith("1 seed")
    # One a stage and damping.
    assert len(two.axes[0].get_lines()) - len(one.axes[0].get_lines()) == 2 * 4


def test_one_score_and_many_stages_can_be_drawn():
    stages = tuple(k / 9 for k in range(1, 10))
    figure = draw_influence(table(stages=stages, scores=("cosine",)))
    figure.canvas.draw()
    assert len(figure.axes) == 1
