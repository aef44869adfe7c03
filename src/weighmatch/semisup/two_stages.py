"""Two stages: learn what the images of the pool are worth, freeze it, train anew on the best.

1. The arm trains in one stage, for a share of the steps.
2. The pool is ranked. The arms `pu` and `learned` fit a small head on the features of the first
   stage's averaged classifier, which stays as it is: it tells near OOD apart where a network on
   the image alone does not. Other arms rank by what they weigh by.
3. Of each pseudo-class the best are kept, equally many of each: a ranking over all classes starves
   those that look least sure. How many is estimated without any truth. A pool in which
   cross-fitting finds no contamination is kept whole.
4. FixMatch trains from the start on what was kept: batches are drawn by weight, 1 or 0, instead of
   weighing losses of images that hardly count.
"""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.checks import require_choice
from weighmatch.semisup.config import ARMS, UNWEIGHTED, ArmName, WeighingConfig
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import (
    Classifier,
    ConfidenceHead,
    Moments,
    RelativeMahalanobis,
)
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.scoring import BATCH, load_classifier, score_images
from weighmatch.semisup.trainer import (
    RunConfig,
    Trainer,
    TrainingSet,
    algorithms,
    fingerprint,
    load_state,
    pick_device,
)
from weighmatch.semisup.weightings import otsu_cut

# Of the first stage's weighting, what the checkpoint repeats of the pool's images.
MEASURED = ("influence", "influence_square", "evidence")
# Arms with a head on frozen features.
WITH_HEAD = ("pu", "learned")
# Has scores for pool images alone, of those that were measured.
TRANSDUCTIVE: ArmName = "free"
# Parts of the labelled images and of the pool when one is judged by what the others show.
FOLDS = 5
# Augmented copies whose features are kept: of a labelled image, of all of them together (but
# one of each), and of a pool image.
COPIES, LABELLED_COPIES, POOL_VIEWS = 128, 6144, 2
# Images of a large pool that the head is fitted on and whose influence is measured; all are ranked.
FITTED = 2048
# Fewer images than these a class are kept of no pool.
FEWEST = 8
# Times that a p of rank sums is taken in the test whether the pool is clean: down to .004 was seen
# in clean pools, and less than a thousandth in pools where three quarters are OOD.
RANK_SUM_FACTOR = 100


@dataclass(frozen=True)
class Ranking:
    """What the first stage says of the pool.

    Attributes:
        scores: what ranks the images, (N,).
        cut: the score above which an image counts as useful; 0: the pool seems clean.
        kept: whether the second stage trains on it, (N,).
        head: the state of the head on frozen features; None: the arm has none.
    """

    scores: Tensor
    cut: float
    kept: Tensor
    head: dict[str, Tensor] | None


class TwoStageTrainer:
    """Trains one arm with one seed in two stages; the second has `config.steps` steps.

    Args:
        config: of the run; `arm` is none of `config.UNWEIGHTED`.

    Raises:
        ValueError: if the arm weighs nothing.
    """

    def __init__(self, config: RunConfig) -> None:
        weighted = tuple(arm for arm in ARMS if arm not in UNWEIGHTED)
        require_choice("arm (in two stages)", config.arm, weighted)
        self.config = config
        weighing = config.training.weighing
        self.first_steps = max(1, round(weighing.first_stage * config.steps))

    def fit(
        self,
        data: TrainingSet,
        checkpoint_dir: Path,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> dict[str, Any]:
        """Train both stages, or go on where they were interrupted.

        Args:
            data: what to train on.
            checkpoint_dir: made if missing; gets a folder a stage and `ranking.pt`.
            progress: called with the number of steps done since the last call, of both stages.

        Returns:
            As `Trainer.fit`, of the second stage; besides, "ranker" (classifier, weighting,
            head and configuration of the first) and "weighting" with the pool's "scores", "cut"
            and "kept". Times and metrics are those of both stages.

        Raises:
            FloatingPointError: if a loss is no longer finite.
            ValueError: if `checkpoint_dir` holds a damaged checkpoint.
        """
        first_config = replace(self.config, steps=self.first_steps)
        first = Trainer(first_config).fit(data, checkpoint_dir / "first_stage", progress)
        ranking = self._ranking(first, data, checkpoint_dir)
        kept = TrainingSet(
            data.labelled_images, data.labels, data.unlabelled_images[ranking.kept.numpy()]
        )
        second = Trainer(replace(self.config, arm="fixmatch")).fit(
            kept, checkpoint_dir / "second_stage", progress
        )
        return self._result(first, ranking, second, data)

    def _ranking(self, first: dict[str, Any], data: TrainingSet, folder: Path) -> Ranking:
        """That of an earlier call for the same run, or a new one."""
        path, run = folder / "ranking.pt", fingerprint(self.config, data)
        state = load_state(path)
        if state is not None and state.pop("fingerprint") == run:
            return Ranking(**state)
        with algorithms(self.config.training.deterministic):
            ranking = rank_pool(first, data, self.config)
        partial = path.with_suffix(".partial")
        torch.save({"fingerprint": run, **vars(ranking)}, partial)
        os.replace(partial, path)
        return ranking

    def _result(
        self,
        first: dict[str, Any],
        ranking: Ranking,
        second: dict[str, Any],
        data: TrainingSet,
    ) -> dict[str, Any]:
        later = [{**line, "step": line["step"] + self.first_steps} for line in second["metrics"]]
        return {
            **second,
            "weighting": {
                "scores": ranking.scores,
                "cut": ranking.cut,
                "kept": ranking.kept,
                **{k: first["weighting"][k] for k in MEASURED if k in first["weighting"]},
            },
            "ranker": {
                "classifier": first["classifier"],
                "weighting": first["weighting"],
                "config": first["config"],
                "head": ranking.head,
            },
            "history": describe_kept(second, ranking.kept, data, self.config.steps),
            "seconds": first["seconds"] + second["seconds"],
            "update_seconds": first["update_seconds"],
            "config": {**asdict(self.config), "stages": 2},
            "metrics": [*first["metrics"], *later],
        }


def describe_kept(
    trained: dict[str, Any], kept: Tensor, data: TrainingSet, steps: int
) -> dict[str, Any]:
    """A "history" of one snapshot: weights of mean 1 for what was kept, and confidences."""
    device = pick_device(trained["config"]["training"]["device"])
    found = score_images(trained, data.unlabelled_images, device)
    confidence = found.probabilities.max(axis=1)
    return {
        "step": [steps],
        "weights": mean_one(kept.float())[None],
        "confidence": torch.from_numpy(confidence).float()[None],
    }


def rank_pool(first: dict[str, Any], data: TrainingSet, config: RunConfig) -> Ranking:
    """Scores of the pool, and which images to keep.

    Args:
        first: what the first stage's `Trainer.fit` returned.
        data: with the pool (N, C, H, W).
        config: of the run; `training.weighing` says how the head is fitted.
    """
    device = pick_device(config.training.device)
    head = None
    if config.arm in WITH_HEAD:
        weighing = config.training.weighing
        classifier = load_classifier(first, data.unlabelled_images.shape[1]).to(device)
        head, chance = fit_head(classifier, first["weighting"], data, config)
        features = _features(classifier, data.unlabelled_images)
        with torch.no_grad():
            pseudo_classes = classifier.cpu().head(features).argmax(dim=1)
            head.standardise(features)
            scores = torch.sigmoid(head(features))
            likely = torch.sigmoid(head.members(features).mean(1)) > weighing.keep_above
        # As many as a positive-unlabelled classifier would keep; which ones, both parts say.
        share, cut = 1.0, 0.0
        level = weighing.contamination_level
        if 0 < level < 1 and 1 in np.bincount(data.labels):
            warnings.warn(
                "a class has a single labelled image, so that no test can find the pool clean; "
                "label another one, or set training.weighing.contamination_level to 0 (keep all) "
                "or 1 (it is contaminated)",
                stacklevel=2,
            )
        contaminated = level >= 1 or chance < level
        if contaminated and not bool(likely.all()):
            share = float(likely.float().mean())
            cut = float(scores.quantile(1 - share))
    else:
        found = score_images(first, data.unlabelled_images, device)
        scores, cut = _criterion(first, torch.from_numpy(found.scores).float())
        pseudo_classes = torch.from_numpy(found.probabilities.argmax(axis=1))
        # None is above the cut where all score the same: nothing is known of any.
        share = float((scores > cut).float().mean()) or 1.0
    kept = torch.ones(len(scores), dtype=torch.bool)
    if share < 1:
        kept = keep_best(scores, pseudo_classes, share, config.classes)
    return Ranking(scores, cut, kept, None if head is None else head.state_dict())


def _criterion(first: dict[str, Any], found: Tensor) -> tuple[Tensor, float]:
    """What ranks a pool without a head, (N,), and Otsu's cut of it.

    Args:
        first: what the first stage's `Trainer.fit` returned.
        found: the arm's own scores of the pool's images as of unseen ones, (N,).
    """
    weighting = first["weighting"]
    known = weighting.get("pool_scores")
    scores = found if known is None else known.cpu()
    if first["config"]["arm"] != TRANSDUCTIVE:
        return scores, otsu_cut(scores)
    measured = weighting["evidence"].cpu() > 0
    if known is None or int(measured.sum()) < 2:
        return torch.ones_like(scores), 1.0
    # An image without a measurement: not above the cut, but before those that are below it.
    cut = otsu_cut(scores[measured])
    return torch.where(measured, scores, cut), cut


def keep_best(scores: Tensor, classes: Tensor, share: float, count: int) -> Tensor:
    """The best of each pseudo-class, (N,) bool.

    Args:
        scores: (N,).
        classes: pseudo-class of each, (N,).
        share: of the N images to keep, in equal parts of the classes; a class with fewer images
            than its part keeps them all.
        count: number of classes.
    """
    part = max(FEWEST, round(share * len(scores) / count))
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for label in range(count):
        members = (classes == label).nonzero().squeeze(1)
        best = scores[members].argsort(descending=True, stable=True)[:part]
        kept[members[best]] = True
    return kept


def fit_head(
    classifier: Classifier, weighting: dict[str, Any], data: TrainingSet, config: RunConfig
) -> tuple[ConfidenceHead, float]:
    """Fit the head that ranks images on frozen features f, and test whether the pool is clean.

    Its MLPs h descend BCE(labelled against pool) − β · mean_i ŝ_i σ(h(f(u_i))). The first term is
    a positive-unlabelled classifier (Elkan & Noto, 2008); the second is the learned weighting's
    own objective, whose gradient in h is the hypergradient, with ŝ_i the mean influence that the
    first stage measured, over its spread. The arm `pu` has β = 0. Its distance is estimated.

    Args:
        classifier: the first stage's average.
        weighting: the first stage's state, with "influence" and "evidence" where it has any.
        data: labelled images and the pool.
        config: of the run.

    Returns:
        The head, whose parts are not standardised yet; and p of `clean_chance`.
    """
    augmentation = Augmentation(config.training.augmentation)
    noise = Streams(config.seed)["augmentation for the head"]
    chosen = pool_sample(len(data.unlabelled_images), config.seed)
    pool = torch.from_numpy(data.unlabelled_images)[chosen]
    influence = _standardised(weighting)[chosen] if config.arm == "learned" else None
    image = torch.arange(labelled_copies(len(data.labels))) % len(data.labels)
    copies = torch.from_numpy(data.labelled_images)[image]
    positives = _augmented_features(classifier, copies, augmentation, noise)
    views = torch.stack(
        [_augmented_features(classifier, pool, augmentation, noise) for _ in range(POOL_VIEWS)]
    )
    return fit_to_features(positives, torch.from_numpy(data.labels), views, influence, config)


def labelled_copies(count: int) -> int:
    """Augmented copies of `count` labelled images that a head is fitted to, as many of each."""
    return count * max(1, min(COPIES, LABELLED_COPIES // count))


def fit_to_features(
    positives: Tensor,
    labels: Tensor,
    views: Tensor,
    influence: Tensor | None,
    config: RunConfig,
) -> tuple[ConfidenceHead, float]:
    """`fit_head`, given features of augmented images.

    Args:
        positives: of the labelled images in turn, (m, width).
        labels: of the n labelled images, (n,).
        views: of pool images, (views, N, width).
        influence: of these, standardised, (N,), or none.
        config: of the run.
    """
    streams = Streams(config.seed)
    seed = derive_seed(config.seed, "initialisation of the head")
    head = ConfidenceHead(positives.shape[1], config.classes, seed)
    positives, views = head.norm(positives), head.norm(views)
    _descend(head, positives, views, influence, config.training.weighing, streams)
    image = torch.arange(len(positives)) % len(labels)
    head.fit_distance(positives, labels[image], views.flatten(0, 1))
    return head, clean_chance(positives, labels, views, config.classes)


def clean_chance(positives: Tensor, labels: Tensor, views: Tensor, classes: int) -> float:
    """Nominal one-sided p of the labelled images scoring so much higher than a clean pool.

    Were labelled images and pool drawn alike, what tells labelled from unlabelled could not know
    a labelled image that it never saw from a pool image that it never saw. Each fold of both is
    scored by a relative Mahalanobis distance estimated on the other folds. Two tests, the smaller
    p counts:

    - the lowest labelled image: if a share q of the pool lies below all n of them, (1 − q)ⁿ, the
      mean over groups of as many copies as a pool image has views (nominal: twice a mean of
      p-values is one, however they depend on each other; Vovk & Wang, 2020);
    - the folds' Mann–Whitney statistics, summed (Mann & Whitney, 1947; by strata: van Elteren,
      1960), p taken `RANK_SUM_FACTOR` times.

    Features were trained with the labels, which lifts labelled images as a whole: rank sums see
    that in clean pools, too. The lowest of them it lifts hardly.

    Args:
        positives: features of augmented copies, of the labelled images in turn, as many of each,
            (m, width).
        labels: of the n labelled images, (n,).
        views: features of augmented views of pool images, (views, N, width).
        classes: how many there are.

    Returns:
        p; 0, so that no pool looks clean, where a class has a single labelled image, or the pool.
    """
    sizes = labels.bincount()
    count = min(FOLDS, int(sizes[sizes > 0].min()), views.shape[1])
    if count < 2:
        return 0.0
    # Every class in every fold: a labelled image is then judged by class means that lack as much
    # of its class as of any other, and so is an image of the pool.
    folds = torch.empty_like(labels)
    for label in labels.unique():
        folds[labels == label] = torch.arange(int(sizes[label])) % count
    # Copies first: (copies, n, width).
    positives = positives.unflatten(0, (-1, len(labels)))
    pool_folds = torch.arange(views.shape[1]) % count
    copies = [positives[:, folds == fold] for fold in range(count)]
    others = [views[:, pool_folds == fold] for fold in range(count)]
    labelled = [
        Moments.of(part.flatten(0, 1), labels[folds == fold].repeat(len(part)), classes)
        for fold, part in enumerate(copies)
    ]
    pool = [Moments.of(part.flatten(0, 1)) for part in others]
    all_labelled, whole_pool = Moments.together(labelled), Moments.together(pool)
    distance = RelativeMahalanobis(positives.shape[2], classes)
    # A labelled image is the mean of as many views as one of the pool: else it would vary less.
    size = min(len(views), len(positives))
    groups = len(positives) // size
    below, excess, variance = [], 0.0, 0.0
    for fold in range(count):
        distance.fit(all_labelled.without(labelled[fold]), whole_pool.without(pool[fold]))
        mine, theirs = _scored(distance, copies[fold]), _scored(distance, others[fold])
        means = mine[: groups * size].unflatten(0, (groups, size)).mean(1)
        ordered = theirs[:size].mean(0).sort().values
        below.append(torch.searchsorted(ordered, means) / len(ordered))
        n, m = mine.shape[1], theirs.shape[1]
        excess += float((mine.mean(0)[:, None] > theirs.mean(0)).float().sum()) - n * m / 2
        variance += n * m * (n + m + 1) / 12
    rank_sum = 0.5 * math.erfc(excess / math.sqrt(2 * variance))
    lowest = torch.cat(below, dim=1).amin(1)
    return min(float((1 - lowest).pow(len(labels)).mean()), RANK_SUM_FACTOR * rank_sum)


def _scored(distance: RelativeMahalanobis, features: Tensor) -> Tensor:
    """Distances (views, n) of features (views, n, width)."""
    scores: Tensor = distance(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    return scores


def _descend(
    head: ConfidenceHead,
    positives: Tensor,
    views: Tensor,
    influence: Tensor | None,
    weighing: WeighingConfig,
    streams: Streams,
) -> None:
    """Fit every member on the same batches; their losses are summed, so that none sees another.

    Features have gone through the head's `norm`.
    """
    optimizer = torch.optim.AdamW(
        head.parameters(),
        lr=weighing.head_learning_rate,
        weight_decay=weighing.weight_decay,
        fused=True,
    )
    generator = streams["batches of the head"]
    half = weighing.head_batch // 2
    targets = torch.arange(2 * half).lt(half).float().unsqueeze(1)
    for _ in range(weighing.head_steps):
        likely = torch.randint(len(positives), (half,), generator=generator)
        drawn = torch.randint(views.shape[1], (half,), generator=generator)
        view = torch.randint(len(views), (half,), generator=generator)
        logits = head.members_of(torch.cat([positives[likely], views[view, drawn]]))
        count = logits.shape[1]
        loss = count * F.binary_cross_entropy_with_logits(logits, targets.expand(-1, count))
        if influence is not None:
            weights = torch.sigmoid(logits[half:])
            gain = (influence[drawn].unsqueeze(1) * weights).mean(0).sum()
            loss = loss - weighing.influence_weight * gain
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _standardised(weighting: dict[str, Any]) -> Tensor:
    """Mean influence of each image over the spread of those measured; 0 where it was not, (N,)."""
    influence, evidence = weighting["influence"].cpu(), weighting["evidence"].cpu()
    known = evidence > 0
    mean = torch.where(known, influence / evidence.clamp(min=1e-12), 0.0)
    if not bool(known.any()):
        return mean
    centred = torch.where(known, mean - mean[known].mean(), 0.0)
    return centred / centred[known].square().mean().sqrt().clamp(min=1e-12)


def pool_sample(size: int, seed: int) -> Tensor:
    """Indices of the images of a pool that a head is fitted on, up to `FITTED` of `size`."""
    generator = Streams(seed)["images that the head is fitted on"]
    everyone = torch.randperm(size, generator=generator)
    return everyone[:FITTED]


def _features(classifier: Classifier, images: NDArray[np.uint8]) -> Tensor:
    """Features of images as they are, (n, width), on the CPU."""
    return _in_batches(classifier, torch.from_numpy(images), lambda batch: batch.float() / 255)


def _augmented_features(
    classifier: Classifier, images: Tensor, augmentation: Augmentation, noise: torch.Generator
) -> Tensor:
    """Features of strong views, (n, width), on the CPU."""
    return _in_batches(classifier, images, lambda batch: augmentation.strong(batch, noise))


def _in_batches(
    classifier: Classifier, images: Tensor, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    device = classifier.head.weight.device
    with torch.no_grad():
        return torch.cat(
            [classifier.features(prepare(batch.to(device))).cpu() for batch in images.split(BATCH)]
        )
