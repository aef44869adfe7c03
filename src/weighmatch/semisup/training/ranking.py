"""Ranking the pool between stages and rounds.

Arms with a head fit it to the features of a trained averaged classifier, which stays as it is: it
tells near OOD apart where a network on the image alone does not. Other arms rank by the
criterion of their weighting. `judges` has what tells how much of a ranking is worth training on,
and `decision` keeps so much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from weighmatch.semisup.checkpoint import BATCH, History, TrainedRun, on_device
from weighmatch.semisup.config import RankingConfig
from weighmatch.semisup.parts.feature_classifier import FeatureClassifier
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.state_file import State
from weighmatch.semisup.parts.store import Stored, as_tensor
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.parts.views import Views, make_views
from weighmatch.semisup.training.config import RunConfig, TrainingSet, pick_device
from weighmatch.semisup.training.decision import Evidence, decide, decide_by_cut
from weighmatch.semisup.training.judges import JUDGES, Case, Known, Seen
from weighmatch.semisup.weightings import Weighting
from weighmatch.semisup.weightings.base import otsu_cut
from weighmatch.semisup.weightings.head import ConfidenceHead
from weighmatch.semisup.weightings.nearness import Nearness

# Augmented copies whose features are kept: at most COPIES_PER_IMAGE of a labelled image and
# MAX_LABELLED_COPIES of all of them together (but one of each), and POOL_VIEWS of a pool image.
COPIES_PER_IMAGE, MAX_LABELLED_COPIES, POOL_VIEWS = 128, 6144, 2
# Images whose features are held at a time while a pool is ranked.
HEAD_BATCH = 8192
# Images of a large pool that the head is fitted on; all are ranked.
MAX_HEAD_IMAGES = 2048


@dataclass(frozen=True)
class Ranking:
    """What a trained run says of the pool.

    Attributes:
        scores: what ranks the images, (N,).
        cut: the score above which an image counts as useful; 0: the pool seems clean.
        kept: the images that the next stage or round trains on, (N,) bool.
        head: parameters of the head on frozen features; None: the arm has none.
        evidence: what the decision rests on; None: the ranking was cut where it falls apart.
    """

    scores: Tensor
    cut: float
    kept: Tensor
    head: dict[str, Tensor] | None
    evidence: Evidence | None = None

    def to_state(self) -> State:
        """Nested containers of tensors and numbers."""
        evidence = None if self.evidence is None else vars(self.evidence)
        return {**vars(self), "evidence": evidence}

    @classmethod
    def from_state(cls, state: State) -> "Ranking":
        """The ranking that `to_state` described."""
        evidence = state["evidence"]
        return cls(**{**state, "evidence": None if evidence is None else Evidence(**evidence)})


def rank_pool(
    run: TrainedRun, known: Known, data: TrainingSet, config: RunConfig, seed: int
) -> tuple[Ranking, Known]:
    """Scores of the pool, and which images to keep.

    Args:
        run: the trained run whose classifier and weighting rank.
        known: what is known of the pool before.
        data: labelled images, and the pool (N, C, H, W).
        config: what defines the whole run; `training.ranking` says how the head is fitted.
        seed: of what is drawn to measure influences.

    Returns:
        The ranking, and what is known after it; those of the first process, in all of them.

    Raises:
        FloatingPointError: if a score is not finite.
    """
    rank = _rank_by_criterion if config.row.judge == "otsu" else _rank_by_head
    found = rank(run, known, data, config, seed)
    return config.group.from_first(lambda: found)


def _rank_by_criterion(
    run: TrainedRun, known: Known, data: TrainingSet, config: RunConfig, seed: int
) -> tuple[Ranking, Known]:
    kind = Weighting.kind(config.row.weighting)
    device = pick_device(config.training.device)

    def score(images: Stored) -> Tensor:
        found = run.score_unchecked(images, device)
        return torch.from_numpy(np.stack([found.scores, found.probabilities.argmax(axis=1)], 1))

    found = torch.cat([config.group.divide(score, part) for part in data.parts(HEAD_BATCH)])
    scores, cut = _criterion(kind, run, found[:, 0].float())
    _require_finite(scores)
    classes = found[:, 1].long()
    decision = decide_by_cut(scores, classes, config.classes, cut)
    return Ranking(scores, decision.cut, decision.kept, None), known


def _rank_by_head(
    run: TrainedRun, known: Known, data: TrainingSet, config: RunConfig, seed: int
) -> tuple[Ranking, Known]:
    classifier = on_device(run.classifier, pick_device(config.training.device))
    views = make_views(config.training)
    seen, head = fit_head(classifier, data, config)
    classes, likely, found = [], [], []
    with torch.no_grad():
        for part in data.parts(HEAD_BATCH):  # features of all would fill the memory
            features = config.group.divide(
                lambda images: _features(classifier, images, views), part
            )
            classes.append(run.classifier.head(features).argmax(dim=1))
            likely.append(torch.sigmoid(head.parts(features)[:, 0]))
            found.append(head(features))
    raw, pseudo_classes = torch.cat(found), torch.cat(classes)
    _require_finite(raw)
    case = Case(run, data, config, seed, seen, head, raw, torch.cat(likely), known)
    # Features that were not trained on the labels can be judged by a test of ranks.
    tested = data.has_features and config.row.judge != "truth"
    evidence, known = JUDGES["nearness" if tested else config.row.judge](case)
    scores = torch.sigmoid(raw)
    decision = decide(scores, pseudo_classes, config.classes, evidence)
    ranking = Ranking(scores, decision.cut, decision.kept, head.state_dict(), evidence)
    return ranking, known


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
        classify, divide = partial(run.classify, device=device), run.config.group.divide
        found = torch.cat([divide(classify, part) for part in data.parts(HEAD_BATCH)])
        confidence, labels = found.max(dim=1)
        snapshots.append((step, mean_one(kept.float()), confidence))
    return History.of(snapshots), labels


def fit_head(
    classifier: Classifier, data: TrainingSet, config: RunConfig
) -> tuple[Seen, ConfidenceHead]:
    """Fit the head that ranks images on frozen features.

    Its MLPs tell labelled images from the pool, as a positive-unlabelled classifier does (Elkan &
    Noto, 2008). The head's distance is estimated. Of exact copies among the labelled images one
    counts: where a fold has the copy of another one's image, a clean pool looks contaminated.

    Args:
        classifier: a trained, averaged classifier.
        data: labelled images and the pool.
        config: what defines the run.

    Returns:
        The features that it was fitted to, and the head.
    """
    views_of = make_views(config.training)
    noise = Streams(config.seed)["augmentation for the head"]
    chosen = pool_sample(data.pool_size, config.seed)
    pool = as_tensor(data.pool_images(chosen.numpy()))
    distinct = _distinct(data)
    labelled = data.labelled_images[distinct]
    labels = data.labels[distinct]
    image = torch.arange(labelled_copies(len(labels))) % len(labels)
    copies = as_tensor(labelled)[image]
    positives = _augmented_features(classifier, copies, views_of, noise)
    views = torch.stack(
        [_augmented_features(classifier, pool, views_of, noise) for _ in range(POOL_VIEWS)]
    )
    seen = Seen(
        positives,
        torch.from_numpy(labels),
        views,
        _features(classifier, labelled, views_of),
        _in_batches(classifier, pool, views_of.plain),
    )
    head = fit_to_features(seen, data.has_features, config)
    config.group.unify(head.state_dict())
    return seen, head


def _distinct(data: TrainingSet) -> NDArray[np.int64]:
    """Positions of the labelled images without exact copies of earlier ones of their class."""
    known: dict[tuple[bytes, int], int] = {}
    for position, (image, label) in enumerate(zip(data.labelled_images, data.labels, strict=True)):
        known.setdefault((image.tobytes(), int(label)), position)
    return np.array(list(known.values()))


def fit_to_features(seen: Seen, frozen: bool, config: RunConfig) -> ConfidenceHead:
    """`fit_head`, given the features.

    Args:
        seen: the features.
        frozen: whether they are of a backbone that was not trained on the labels: the distance is
            then nearness, which averages over the pool itself.
        config: what defines the run.
    """
    streams, width = Streams(config.seed), seen.positives.shape[1]
    seed = derive_seed(config.seed, "initialisation of the head")
    distance = Nearness(width, config.classes) if frozen else None
    head = ConfidenceHead(width, config.classes, seed, distance=distance)
    positives, views = head.norm(seen.positives), head.norm(seen.views)
    _fit_members(head, positives, views, config.training.ranking, streams)
    if frozen:
        head.fit_distance(head.norm(seen.labelled), seen.labels, head.norm(seen.pool))
    else:
        image = torch.arange(len(positives)) % len(seen.labels)
        head.fit_distance(positives, seen.labels[image], views.flatten(0, 1))
    with torch.no_grad():
        head.standardise(head.parts(seen.pool))
        if config.row.averages and not frozen:
            head.refer_to(seen.pool)
    return head


def rank_early(data: TrainingSet) -> Tensor:
    """Nearness of the pool's images to the labelled ones, (N,): a ranking before any training.

    Args:
        data: of stored features.
    """
    classifier = FeatureClassifier(data.unlabelled_images.shape[2], data.classes)
    first = as_tensor(next(data.parts(MAX_HEAD_IMAGES)))[:, 0].float()
    classifier.trunk.fit(first)
    norm = nn.LayerNorm(first.shape[1], elementwise_affine=False)
    labelled = as_tensor(data.labelled_images)[:, 0].float()
    nearness = Nearness(first.shape[1], data.classes)
    with torch.no_grad():
        sample = norm(classifier.trunk(first))
        nearness.fit(norm(classifier.trunk(labelled)), torch.from_numpy(data.labels), sample)
        parts = (as_tensor(part)[:, 0].float() for part in data.parts(BATCH))
        return torch.cat([nearness(norm(classifier.trunk(part))) for part in parts])


def labelled_copies(count: int) -> int:
    """Augmented copies of `count` labelled images that a head is fitted to, as many of each."""
    return count * max(1, min(COPIES_PER_IMAGE, MAX_LABELLED_COPIES // count))


def _fit_members(
    head: ConfidenceHead,
    positives: Tensor,
    views: Tensor,
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
    targets = torch.arange(2 * half).lt(half).to(positives.dtype).unsqueeze(1)
    for _ in range(ranking.steps):
        likely = torch.randint(len(positives), (half,), generator=generator)
        drawn = torch.randint(views.shape[1], (half,), generator=generator)
        view = torch.randint(len(views), (half,), generator=generator)
        logits = head.members_of(torch.cat([positives[likely], views[view, drawn]]))
        count = logits.shape[1]
        loss = count * F.binary_cross_entropy_with_logits(logits, targets.expand(-1, count))
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
