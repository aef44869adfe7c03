"""Ranking the pool between stages and rounds.

Arms with a head fit it to the features of a trained averaged classifier, which stays as it is: it
tells near OOD apart where a network on the image alone does not. Other arms rank by the
criterion of their weighting. `decision` says how much of the ranking is kept, without any truth.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.semisup.checkpoint import BATCH, History, TrainedRun, on_device
from weighmatch.semisup.config import RankingConfig
from weighmatch.semisup.parts.feature_classifier import FeatureClassifier
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.store import Stored, as_tensor
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.parts.views import Views, make_views
from weighmatch.semisup.training.config import RunConfig, TrainingSet, pick_device
from weighmatch.semisup.training.decision import Evidence, clean_chance, decide, decide_by_cut
from weighmatch.semisup.weightings import Weighting
from weighmatch.semisup.weightings.base import otsu_cut
from weighmatch.semisup.weightings.head import ConfidenceHead
from weighmatch.semisup.weightings.meter import Measured
from weighmatch.semisup.weightings.nearness import Nearness, judge_pool

# Augmented copies whose features are kept: at most COPIES_PER_IMAGE of a labelled image and
# MAX_LABELLED_COPIES of all of them together (but one of each), and POOL_VIEWS of a pool image.
COPIES_PER_IMAGE, MAX_LABELLED_COPIES, POOL_VIEWS = 128, 6144, 2
# Images whose features are held at a time while a pool is ranked.
HEAD_BATCH = 8192
# Images of a large pool that the head is fitted on and whose influence is measured; all are ranked.
MAX_HEAD_IMAGES = 2048


@dataclass(frozen=True)
class Ranking:
    """What a trained run says of the pool.

    Attributes:
        scores: what ranks the images, (N,).
        cut: the score above which an image counts as useful; 0: the pool seems clean.
        kept: the images that the next stage or round trains on, (N,) bool.
        head: parameters of the head on frozen features; None: the arm has none.
    """

    scores: Tensor
    cut: float
    kept: Tensor
    head: dict[str, Tensor] | None


def rank_pool(
    run: TrainedRun, measured: Measured | None, data: TrainingSet, config: RunConfig
) -> Ranking:
    """Scores of the pool, and which images to keep.

    Args:
        run: the trained run whose classifier and weighting rank.
        measured: influences of the pool's images, for the head of an arm that measures them.
        data: labelled images, and the pool (N, C, H, W).
        config: what defines the whole run; `training.ranking` says how the head is fitted.

    Raises:
        FloatingPointError: if a score is not finite.
    """
    kind = Weighting.kind(config.row.weighting)
    if kind.ranks_by_head:
        return _rank_by_head(run, measured if kind.measures_rounds else None, data, config)
    found = run.score_unchecked(data.plain_pool, pick_device(config.training.device))
    scores, cut = _criterion(kind, run, torch.from_numpy(found.scores).float())
    _require_finite(scores)
    classes = torch.from_numpy(found.probabilities.argmax(axis=1))
    decision = decide_by_cut(scores, classes, config.classes, cut)
    return Ranking(scores, decision.cut, decision.kept, None)


def _rank_by_head(
    run: TrainedRun, measured: Measured | None, data: TrainingSet, config: RunConfig
) -> Ranking:
    classifier = on_device(run.classifier, pick_device(config.training.device))
    head, p_clean, share = fit_head(classifier, measured, data, config)
    views = make_views(config.training)
    pool, found = data.plain_pool, []
    with torch.no_grad():
        for start in range(0, len(pool), HEAD_BATCH):  # features of all would fill the memory
            features = _features(classifier, pool[start : start + HEAD_BATCH], views)
            found.append((run.classifier.head(features).argmax(dim=1), head.parts(features)))
        pseudo_classes, parts = (torch.cat(column) for column in zip(*found, strict=True))
        head.standardise(parts)
        scores = torch.sigmoid(head.combine(parts))
        _require_finite(scores)
    ranking = config.training.ranking
    if share is None:
        # As many as a positive-unlabelled classifier would keep; which ones, both parts say.
        likely = torch.sigmoid(parts[:, 0])
        share = float((likely > ranking.keep_above).float().mean())
    evidence = Evidence(share, p_clean, ranking.contamination_level)
    decision = decide(scores, pseudo_classes, config.classes, evidence)
    return Ranking(scores, decision.cut, decision.kept, head.state_dict())


def _require_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise FloatingPointError(
            "the scores of the pool are not finite; lower training.learning_rate"
        )


def _criterion(kind: type[Weighting], run: TrainedRun, found: Tensor) -> tuple[Tensor, float]:
    """What ranks a pool without a head, (N,), and Otsu's cut of it.

    Args:
        kind: the weighting's class.
        run: the trained run.
        found: the arm's own scores of the pool's images as of unseen ones, (N,).
    """
    known = run.weighting.get("pool_scores")
    scores = found if known is None else known.cpu()
    if not kind.transductive:
        return scores, otsu_cut(scores)
    measured = run.pool.measured
    if known is None or measured is None or int(measured.known.sum()) < 2:
        return torch.ones_like(scores), 1.0
    # An image without a measurement: not above the cut, but before those that are below it.
    cut = otsu_cut(scores[measured.known])
    return torch.where(measured.known, scores, cut), cut


def record_kept(
    stages: list[tuple[int, TrainedRun, Tensor]], data: TrainingSet
) -> tuple[History, Tensor]:
    """A snapshot of the pool for each stage or round, and the last one's pseudo-labels, (N,).

    Args:
        stages: the step at its end, the run at its end, and what it was trained on, (N,) bool,
            which has equal weights of mean 1.
        data: with the pool of N images.
    """
    snapshots = []
    for step, run, kept in stages:
        device = pick_device(run.config.training.device)
        confidence, labels = run.classify(data.plain_pool, device).max(dim=1)
        snapshots.append((step, mean_one(kept.float()), confidence))
    return History.of(snapshots), labels


def fit_head(
    classifier: Classifier, measured: Measured | None, data: TrainingSet, config: RunConfig
) -> tuple[ConfidenceHead, float | None, float | None]:
    """Fit the head that ranks images on frozen features f, and test whether the pool is clean.

    Its MLPs h descend BCE(labelled against pool) − β · mean_i ŝ_i σ(h(f(u_i))). The first term is
    a positive-unlabelled classifier (Elkan & Noto, 2008); the second is the learned weighting's
    own objective, whose gradient in h is the hypergradient, with ŝ_i the mean measured influence
    over its spread. Without measurements β = 0. The head's distance is estimated.

    Args:
        classifier: a trained, averaged classifier.
        measured: influences of the pool's images, or none.
        data: labelled images and the pool.
        config: what defines the run.

    Returns:
        The head, whose parts are not standardised yet; p of the pool being clean, or None; and
        the useful share of the pool, or None where the head's MLPs are to say.
    """
    views_of = make_views(config.training)
    noise = Streams(config.seed)["augmentation for the head"]
    chosen = pool_sample(data.pool_size, config.seed)
    pool = as_tensor(data.pool_images(chosen.numpy()))
    influence = None if measured is None else measured.to("cpu").standardised()[chosen]
    image = torch.arange(labelled_copies(len(data.labels))) % len(data.labels)
    copies = torch.from_numpy(np.asarray(data.labelled_images))[image]
    positives = _augmented_features(classifier, copies, views_of, noise)
    views = torch.stack(
        [_augmented_features(classifier, pool, views_of, noise) for _ in range(POOL_VIEWS)]
    )
    labels = torch.from_numpy(data.labels)
    if not isinstance(classifier, FeatureClassifier):
        head, p_clean = fit_to_features(positives, labels, views, influence, config)
        return head, p_clean, None
    labelled = _features(classifier, data.labelled_images, views_of)
    plain = _in_batches(classifier, pool, views_of.plain)
    return fit_to_frozen(positives, views, influence, labelled, labels, plain, config)


def fit_to_frozen(
    positives: Tensor,
    views: Tensor,
    influence: Tensor | None,
    labelled: Tensor,
    labels: Tensor,
    pool: Tensor,
    config: RunConfig,
) -> tuple[ConfidenceHead, float | None, float]:
    """`fit_head` on features of a frozen backbone, by nearness (`weightings.nearness`).

    Args:
        positives: features of strong views of the labelled images in turn, (m, width).
        views: features of strong views of pool images, (views, N, width).
        influence: influences of these images, standardised, (N,), or none.
        labelled: features of the n labelled images as they are, (n, width).
        labels: their labels, (n,).
        pool: features of the pool images as they are, (N, width).
        config: what defines the run.
    """
    streams, width = Streams(config.seed), labelled.shape[1]
    seed = derive_seed(config.seed, "initialisation of the head")
    distance = Nearness(width, config.classes)
    head = ConfidenceHead(width, config.classes, seed, distance=distance)
    positives, views = head.norm(positives), head.norm(views)
    _fit_members(head, positives, views, influence, config.training.ranking, streams)
    labelled, pool = head.norm(labelled), head.norm(pool)
    head.fit_distance(labelled, labels, pool)
    return head, *judge_pool(labelled, labels, pool, config.classes)


def rank_early(data: TrainingSet) -> Tensor:
    """Nearness of the pool's images to the labelled ones, (N,): a ranking before any training.

    Args:
        data: of stored features.
    """
    classifier = FeatureClassifier(data.unlabelled_images.shape[2], data.classes)
    pool = as_tensor(data.plain_pool)
    classifier.trunk.fit(pool[:MAX_HEAD_IMAGES, 0].float())
    norm = nn.LayerNorm(pool.shape[2], elementwise_affine=False)
    labelled = as_tensor(data.labelled_images)[:, 0].float()
    nearness = Nearness(pool.shape[2], data.classes)
    with torch.no_grad():
        sample = norm(classifier.trunk(pool[:MAX_HEAD_IMAGES, 0].float()))
        nearness.fit(norm(classifier.trunk(labelled)), torch.from_numpy(data.labels), sample)
        parts = pool[:, 0].split(BATCH)
        return torch.cat([nearness(norm(classifier.trunk(part.float()))) for part in parts])


def labelled_copies(count: int) -> int:
    """Augmented copies of `count` labelled images that a head is fitted to, as many of each."""
    return count * max(1, min(COPIES_PER_IMAGE, MAX_LABELLED_COPIES // count))


def fit_to_features(
    positives: Tensor,
    labels: Tensor,
    views: Tensor,
    influence: Tensor | None,
    config: RunConfig,
) -> tuple[ConfidenceHead, float | None]:
    """`fit_head`, given features of augmented images.

    Args:
        positives: features of the labelled images in turn, (m, width).
        labels: labels of the n labelled images, (n,).
        views: features of pool images, (views, N, width).
        influence: their influences, standardised, (N,), or none.
        config: what defines the run.
    """
    streams = Streams(config.seed)
    seed = derive_seed(config.seed, "initialisation of the head")
    head = ConfidenceHead(positives.shape[1], config.classes, seed)
    positives, views = head.norm(positives), head.norm(views)
    _fit_members(head, positives, views, influence, config.training.ranking, streams)
    image = torch.arange(len(positives)) % len(labels)
    head.fit_distance(positives, labels[image], views.flatten(0, 1))
    return head, clean_chance(positives, labels, views, config.classes)


def _fit_members(
    head: ConfidenceHead,
    positives: Tensor,
    views: Tensor,
    influence: Tensor | None,
    ranking: RankingConfig,
    streams: Streams,
) -> None:
    """Fit every member on the same batches; their losses are summed, so that none sees another.

    Features have gone through the head's `norm`.
    """
    optimizer = torch.optim.AdamW(
        head.parameters(),
        lr=ranking.learning_rate,
        weight_decay=ranking.weight_decay,
        fused=True,
    )
    generator = streams["batches of the head"]
    half = ranking.batch // 2
    targets = torch.arange(2 * half).lt(half).float().unsqueeze(1)
    for _ in range(ranking.steps):
        likely = torch.randint(len(positives), (half,), generator=generator)
        drawn = torch.randint(views.shape[1], (half,), generator=generator)
        view = torch.randint(len(views), (half,), generator=generator)
        logits = head.members_of(torch.cat([positives[likely], views[view, drawn]]))
        count = logits.shape[1]
        loss = count * F.binary_cross_entropy_with_logits(logits, targets.expand(-1, count))
        if influence is not None:
            weights = torch.sigmoid(logits[half:])
            gain = (influence[drawn].unsqueeze(1) * weights).mean(0).sum()
            loss = loss - ranking.influence_weight * gain
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def pool_sample(size: int, seed: int) -> Tensor:
    """Up to `MAX_HEAD_IMAGES` of the `size` images of a pool, on which a head is fitted."""
    generator = Streams(seed)["images that the head is fitted on"]
    everyone = torch.randperm(size, generator=generator)
    return everyone[:MAX_HEAD_IMAGES]


def _features(classifier: Classifier, images: Stored, views: Views) -> Tensor:
    """Features of images as they are, (n, width), on the CPU."""
    return _in_batches(classifier, as_tensor(images), views.plain)


def _augmented_features(
    classifier: Classifier, images: Tensor, views: Views, noise: torch.Generator
) -> Tensor:
    """Features of strong views, (n, width), on the CPU."""
    return _in_batches(classifier, images, lambda batch: views.strong(batch, noise))


def _in_batches(
    classifier: Classifier, images: Tensor, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    device = classifier.head.weight.device
    with torch.no_grad():
        return torch.cat(
            [classifier.features(prepare(batch.to(device))).cpu() for batch in images.split(BATCH)]
        )
