"""Two lists for a person with time for a few images: what to label next, which labels to check."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from weighmatch.evaluation.chosen import HeldOut
from weighmatch.evaluation.judging import Arrays
from weighmatch.evaluation.ranking import name_classes

Floats = NDArray[np.float64]

TO_LABEL = 20
NEXT_COLUMNS = ("path", "predicted_class", "confidence", "score", "kept")
CHECK_COLUMNS = ("path", "label", "suggested", "probability_of_label", "probability", "how")
# What an image of which the classifier is certain still counts for.
LEAST_DOUBT = 1e-3
FOLDS = 5
BY_RUNS = "by classifiers that did not learn from it"
BY_FEATURES = "by a probe on features that did learn from it"


def label_next(pool: Arrays, files: pd.DataFrame, count: int = TO_LABEL) -> pd.DataFrame:
    """Pool images whose label would help most: useful, uncertain and far from one another.

    One after the other the image is taken with the largest product of its doubt (1 − confidence)
    and its squared distance in features to what has a label or was taken, as k-means++ starts its
    centres, without its randomness (Arthur & Vassilvitskii, 2007). Images that are not kept are
    not asked for.

    Args:
        pool: from `describe_pool`.
        files: the file behind each image, in the order of the pool.
        count: how many images to list.

    Returns:
        The columns `NEXT_COLUMNS`, in the order in which the images were taken.
    """
    probabilities = pool["probabilities"]
    confidence = probabilities.max(axis=1).astype(np.float64)
    able = np.flatnonzero(pool["kept"])
    features = pool["features"].astype(np.float64)
    taken: list[int] = []
    if len(able):
        doubt = 1 - confidence[able] + LEAST_DOUBT
        near = _squared(features[able], pool["labelled_features"].astype(np.float64)).min(axis=1)
        for _ in range(min(count, len(able))):
            gain = doubt * near
            gain[np.isin(able, taken)] = -1
            best = int(gain.argmax())
            taken.append(int(able[best]))
            near = np.minimum(near, _squared(features[able], features[able[best]][None])[:, 0])
    table = pd.DataFrame(
        {
            "path": [str(files["path"].iloc[k]) for k in taken],
            "predicted_class": name_classes(pool)[probabilities[taken].argmax(axis=1)],
            "confidence": confidence[taken],
            "score": pool["scores"][taken],
            "kept": pool["kept"][taken].astype(bool),
        }
    )
    return table[list(NEXT_COLUMNS)]


def _squared(points: Floats, others: Floats) -> Floats:
    """Squared distances (n, m)."""
    both = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    distances: Floats = np.clip(both - 2 * points @ others.T, 0, None)
    return distances


def labels_to_check(pool: Arrays, labelled: pd.DataFrame, held: HeldOut | None) -> pd.DataFrame:
    """Labelled images whose label the others contradict.

    An image is listed if another class is likelier for it than its own, and at least as likely as
    that class is on average for the images that bear it (confident learning; Northcutt, Jiang &
    Chuang, 2021). Images that some run did not learn from are judged by these runs. The others are
    judged by a logistic regression on the run's features, fitted on other folds: the features
    themselves did learn from them, and miss more.

    Args:
        pool: from `describe_pool`, for `labelled_features`, `labels` and `class_names`.
        labelled: the file behind each of its labelled images, in their order.
        held: what was held out.

    Returns:
        The columns `CHECK_COLUMNS`, the strongest contradiction first.
    """
    names = name_classes(pool)
    parts = []
    if held is not None:
        parts.append((list(held.paths), held.labels, held.probabilities, BY_RUNS))
    known = set(held.paths) if held is not None else set()
    paths = [str(path) for path in labelled["path"]]
    rest = np.array([path not in known for path in paths], bool)
    judged = _by_features(pool) if rest.any() else None
    if judged is not None:
        left = [path for path, wanted in zip(paths, rest, strict=True) if wanted]
        parts.append((left, pool["labels"][rest], judged[rest], BY_FEATURES))
    tables = [_contradicted(*part, names) for part in parts]
    table = pd.concat(tables) if tables else pd.DataFrame(columns=list(CHECK_COLUMNS))
    gap = (table["probability"] - table["probability_of_label"]).to_numpy(dtype=float)
    return table.iloc[np.argsort(-gap, kind="stable")].reset_index(drop=True)


def _by_features(pool: Arrays) -> Floats | None:
    """Out-of-fold probabilities of the labelled images, (n, classes); None: too few labels."""
    labels = pool["labels"]
    sizes = np.bincount(labels, minlength=len(pool["class_names"]))
    folds = int(min(FOLDS, sizes.min()))
    if folds < 2:
        return None
    model = LogisticRegression(max_iter=1000)
    splits = StratifiedKFold(folds, shuffle=True, random_state=0)
    found: Floats = cross_val_predict(
        model, pool["labelled_features"], labels, cv=splits, method="predict_proba"
    )
    return found


def _contradicted(
    paths: list[str],
    labels: NDArray[np.int64],
    probabilities: Floats,
    how: str,
    names: NDArray[np.str_],
) -> pd.DataFrame:
    own = probabilities[np.arange(len(labels)), labels]
    suggested = probabilities.argmax(axis=1)
    highest = probabilities.max(axis=1)
    usual = np.ones(probabilities.shape[1])
    for label in np.unique(labels):
        usual[label] = own[labels == label].mean()
    listed = np.flatnonzero((suggested != labels) & (highest >= usual[suggested]))
    return pd.DataFrame(
        {
            "path": [paths[k] for k in listed],
            "label": names[labels[listed]],
            "suggested": names[suggested[listed]],
            "probability_of_label": own[listed],
            "probability": highest[listed],
            "how": how,
        },
        columns=list(CHECK_COLUMNS),
    )
