"""A ranked pool made by hand: two classes in the plane, and foreign images far from both."""

import numpy as np
import pandas as pd


def pool(seed=0, useful=30, foreign=20, labels=8):
    """Arrays as `describe_pool` gives them; the first `useful` images are useful."""
    rng = np.random.default_rng(seed)
    total = useful + foreign
    centres = np.array([[1.0, 0.0], [0.0, 1.0]])
    classes = np.arange(useful) % 2
    features = np.concatenate(
        [centres[classes] + 0.1 * rng.normal(size=(useful, 2)), rng.normal(-1, 0.1, (foreign, 2))]
    )
    own = np.arange(labels) % 2
    confidence = np.where(np.arange(total) < useful, 0.95, 0.6)
    confidence = confidence + 0.04 * rng.random(total)
    predicted = np.concatenate([classes, np.arange(foreign) % 2])
    probabilities = np.empty((total, 2))
    probabilities[np.arange(total), predicted] = confidence
    probabilities[np.arange(total), 1 - predicted] = 1 - confidence
    kept = np.arange(total) < useful
    return {
        "probabilities": probabilities,
        "scores": np.where(kept, 0.9, 0.1) + 0.05 * rng.random(total),
        "weights": np.where(kept, 1.6, 0.1),
        "kept": kept,
        "influence": np.where(kept, 1.0, np.nan),
        "likeness": np.where(kept, 0.9, 0.2) + 0.05 * rng.random(total),
        "features": features.astype(np.float32),
        "labelled_features": (centres[own] + 0.1 * rng.normal(size=(labels, 2))).astype(np.float32),
        "labels": own.astype(np.int64),
        "class_names": np.array(["cat", "dog"]),
    }


def files(count, split="pool", key="k", labels=None, **columns):
    """Rows of `image_files`."""
    table = pd.DataFrame(
        {
            "key": key,
            "split": split,
            "index": np.arange(count),
            "path": [f"{split}/{k:03d}.png" for k in range(count)],
            "label": [""] * count if labels is None else labels,
            "duplicate_of": "",
            "near_duplicate_of": "",
        }
    )
    return table.assign(**columns)
