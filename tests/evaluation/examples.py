"""Tables of runs made by hand."""

import itertools

import numpy as np
import pandas as pd

from weighmatch.evaluation.judging import SCORES

CELL = {
    "source": "digits",
    "setting": "unseen",
    "regime": "fixed_total",
    "ratio": 0.75,
    "labels_per_class": 4,
}
# Cost in steps, accuracy in per cent.
ARMS = {
    "supervised": (300, 60),
    "fixmatch": (2000, 80),
    "fixmatch_matched": (2400, 82),
    "fixmatch_converged": (4800, 86),
    "fixmatch_realigned": (2400, 83),
    "fixmatch_rounds": (2400, 84),
    "pu": (2200, 87),
    "learned": (2400, 89),
    "oracle": (2000, 93),
}
BOTH = ("online", "two_stages")


def scores(schedule="online", **accuracy):
    """A row a run of one cell, from the accuracies of each arm, one a seed."""
    extra = ("steps", "seconds", "update_seconds", "mask_rate", "cost", *SCORES)
    return pd.DataFrame(
        [
            {
                **CELL,
                "arm": arm,
                "schedule": schedule,
                "seed": seed,
                **dict.fromkeys(extra, 1.0),
                "accuracy": value,
            }
            for arm, values in accuracy.items()
            for seed, value in enumerate(values)
        ]
    )


def grid(seeds=5, settings=("near+far", "shifted: inverted"), ratios=(0.75, 0.5), arms=ARMS):
    """A row a run of several cells; `pu`, `learned` and restarts have two schedules."""
    rng = np.random.default_rng(0)
    tables = []
    for setting, ratio, arm in itertools.product(settings, ratios, arms):
        cost, accuracy = arms[arm]
        for stage, schedule in enumerate(BOTH, start=1):
            if stage == 1 or arm in ("fixmatch_rounds", "pu", "learned"):
                found = accuracy + stage - 10 * (ratio - 0.5) + 2 * rng.normal(size=seeds)
                changes = {"setting": setting, "ratio": ratio, "cost": float(cost * stage)}
                tables.append(scores(schedule, **{arm: found}).assign(**changes))
    return pd.concat(tables, ignore_index=True)
