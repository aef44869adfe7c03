"""Rounds: rank the pool, train on its best, and rank it again with the better classifier.

What tells near OOD from useful images are the classifier's features, and intruders spoil these.
So ranking and training alternate. Every round

1. goes on with the averaged classifier of the round before (the first one starts anew, with the
   whole pool) and trains it by FixMatch on what is kept, the learning rate from the start; but as
   long as no round has dropped anything, it goes on with FixMatch's own run, so that a pool that
   never looks contaminated costs nothing but its rankings;
2. measures, for the arm `learned`, the influence of pool images (`two_stages.pool_sample`) at the
   classifier so found: the hypergradient with respect to an image's weight;
3. fits a head on the classifier's frozen features (`two_stages.fit_head`), ranks the whole pool
   with it, and keeps the best of each pseudo-class: an image left out may come back.

All rounds together take `RunConfig.steps` steps.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weighmatch.checks import require_choice, require_integer
from weighmatch.semisup.config import RANKED_ANEW, RESTARTED
from weighmatch.semisup.learned import Learned
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import PseudoLabels
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.scoring import load_classifier
from weighmatch.semisup.trainer import (
    RunConfig,
    Trainer,
    TrainingSet,
    algorithms,
    fingerprint,
    load_state,
    pick_device,
)
from weighmatch.semisup.two_stages import (
    MEASURED,
    Ranking,
    describe_kept,
    pool_sample,
    rank_pool,
)

State = dict[str, Tensor]


class RoundsTrainer:
    """Trains one arm with one seed in rounds.

    Args:
        config: of the run; `arm` is one of `config.RANKED_ANEW`, or `config.RESTARTED`, which
            keeps the whole pool in all rounds.
        rounds: how many.

    Raises:
        ValueError: if there are fewer steps than rounds, or the arm has none.
    """

    def __init__(self, config: RunConfig, rounds: int) -> None:
        require_choice("arm (in rounds)", config.arm, (*RANKED_ANEW, RESTARTED))
        require_integer("rounds", rounds, 1)
        if config.steps < rounds:
            raise ValueError(
                f"training.steps {config.steps} are fewer than {rounds} rounds; raise them or "
                "take fewer rounds"
            )
        self.config, self.rounds = config, rounds

    def fit(
        self,
        data: TrainingSet,
        checkpoint_dir: Path,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> dict[str, Any]:
        """Train all rounds, or go on where they were interrupted.

        Args:
            data: what to train on.
            checkpoint_dir: made if missing; gets a folder a round with its `ranking.pt`.
            progress: called with the number of steps done since the last call.

        Returns:
            As `Trainer.fit`, of the last round; besides, "ranker" (its classifier and head) and
            "weighting" with the pool's "scores", "cut" and "kept" and, of the arm `learned`, its
            influences. "history" has a snapshot a round: what it trained on, with weights of
            mean 1, and confidences at its end. "seconds" and metrics are those of all rounds,
            rankings included; "update_seconds" is the mean time of a ranking. The arm
            `RESTARTED` has no "ranker", and its "weighting" is empty.

        Raises:
            FloatingPointError: if a loss is no longer finite.
            ValueError: if `checkpoint_dir` holds a damaged checkpoint, or a label is no class.
        """
        kept = torch.ones(len(data.unlabelled_images), dtype=torch.bool)
        measured: State = {}
        trained: dict[str, Any] = {}
        metrics: list[dict[str, Any]] = []
        history: list[dict[str, Any]] = []
        seconds, ranking_seconds, done = 0.0, 0.0, 0
        whole = self.config.arm != RESTARTED
        for number in range(self.rounds):
            folder = checkpoint_dir / f"round_{number}"
            end = (number + 1) * self.config.steps // self.rounds
            if whole:
                before, offset = trained.get("seconds", 0.0), 0
                trained = Trainer(replace(self.config, arm="fixmatch")).fit(
                    data,
                    folder,
                    _beyond(done, progress),
                    until=end,
                    earlier=checkpoint_dir / f"round_{number - 1}",
                )
            else:
                before, offset = 0.0, done
                chosen = replace(data, unlabelled_images=data.unlabelled_images[kept.numpy()])
                trained = Trainer(self._config(number, end - done)).fit(
                    chosen, folder, progress, trained.get("classifier")
                )
            ranking, spent = None, 0.0
            if self.config.arm != RESTARTED:
                ranking, measured, spent = self._rank(
                    trained, data, kept, measured, folder, self._seed(number)
                )
            metrics += [
                {
                    **line,
                    "step": line["step"] + offset,
                    "seconds": line["seconds"] - before + seconds,
                }
                for line in trained["metrics"]
                if line["step"] + offset > done
            ]
            done = end
            history.append(describe_kept(trained, kept, data, done))
            seconds += trained["seconds"] - before + spent
            ranking_seconds += spent
            if ranking is not None and number < self.rounds - 1:
                kept = ranking.kept
                whole = whole and bool(kept.all())
        found = {} if ranking is None else self._ranked(trained, ranking, kept, measured)
        return {
            **trained,
            **found,
            "history": {
                "step": [step for snapshot in history for step in snapshot["step"]],
                **{
                    name: torch.cat([snapshot[name] for snapshot in history])
                    for name in ("weights", "confidence")
                },
            },
            "seconds": seconds,
            "update_seconds": ranking_seconds / self.rounds if found else math.nan,
            "config": {**asdict(self.config), "stages": self.rounds},
            "metrics": metrics,
        }

    def _ranked(
        self, trained: dict[str, Any], ranking: Ranking, kept: Tensor, measured: State
    ) -> dict[str, Any]:
        """What the last ranking adds to the answer."""
        weighting = {"scores": ranking.scores, "cut": ranking.cut, "kept": kept, **measured}
        ranker = {name: trained[name] for name in ("classifier", "weighting")}
        return {
            "weighting": weighting,
            "ranker": {**ranker, "config": self._ranker(trained), "head": ranking.head},
        }

    def _config(self, number: int, steps: int) -> RunConfig:
        """Of a round: FixMatch, with random streams of its own."""
        seed = self._seed(number)
        return replace(self.config, arm="fixmatch", seed=seed, steps=steps)

    def _seed(self, number: int) -> int:
        """Of a round's random streams."""
        seed = self.config.seed
        return derive_seed(seed, f"round {number}") if number else seed

    def _ranker(self, trained: dict[str, Any]) -> dict[str, Any]:
        """The configuration of a round under the arm's name, by which its criterion is known."""
        return {**trained["config"], "arm": self.config.arm}

    def _rank(
        self,
        trained: dict[str, Any],
        data: TrainingSet,
        kept: Tensor,
        measured: State,
        folder: Path,
        seed: int,
    ) -> tuple[Ranking, State, float]:
        """That of an earlier call for the same run, or a new one; and the seconds it took."""
        path, run = folder / "ranking.pt", fingerprint(self.config, data, trained["classifier"])
        known = load_state(path)
        if known is not None and known["fingerprint"] == run:
            return Ranking(**known["ranking"]), known["measured"], known["seconds"]
        started = time.perf_counter()
        with algorithms(self.config.training.deterministic):
            if self.config.arm == "learned":
                measured = measure_pool(trained, data, kept, measured, self.config, seed)
            found = {**trained, "weighting": measured, "config": self._ranker(trained)}
            ranking = rank_pool(found, data, self.config)
        seconds = time.perf_counter() - started
        state = {"ranking": vars(ranking), "measured": measured, "seconds": seconds}
        partial = path.with_suffix(".partial")
        torch.save({"fingerprint": run, **state}, partial)
        os.replace(partial, path)
        return ranking, measured, seconds


def _beyond(done: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    """`progress` without the first `done` steps, which it was told of before."""
    known = done

    def report(steps: int) -> None:
        nonlocal known
        told = min(known, steps)
        known -= told
        progress(steps - told)

    return report


def measure_pool(
    trained: dict[str, Any],
    data: TrainingSet,
    kept: Tensor,
    before: State,
    config: RunConfig,
    seed: int,
) -> State:
    """Influence of images of the pool at a trained classifier, averaged with earlier ones.

    Args:
        trained: what `Trainer.fit` returned.
        data: with the pool (N, C, H, W).
        kept: which of its images were trained on, (N,) bool.
        before: what this function returned of an earlier classifier, or nothing.
        config: of the run.
        seed: of what is drawn; another one each time, so that the average loses noise.

    Returns:
        "influence", "influence_square" and "evidence", each (N,), as `Learned` keeps them.
    """
    classifier = load_classifier(trained, data.unlabelled_images.shape[1])
    device = pick_device(config.training.device)
    meter = PoolInfluence(data, config, seed, device)
    for name, value in before.items():
        setattr(meter, name, value.to(device))
    meter.measure(classifier.to(device), kept.nonzero().squeeze(1))
    return {name: getattr(meter, name).cpu() for name in MEASURED}


class PoolInfluence(Learned):
    """Influences of a pool (`two_stages.pool_sample`) on a classifier trained with equal weights.

    One solve serves all images: the averaged classifier at the end of a round moves little.
    """

    def __init__(
        self, data: TrainingSet, config: RunConfig, seed: int, device: torch.device
    ) -> None:
        training = config.training
        labelled = torch.from_numpy(data.labelled_images).to(device)
        labels = torch.from_numpy(np.asarray(data.labels)).to(device)
        super().__init__(
            labelled,
            labels,
            (labelled, labels),
            ImageStore(data.unlabelled_images, device, training.pool_memory),
            Augmentation(training.augmentation),
            training.weighing,
            Streams(derive_seed(seed, "influence of the pool")),
            training.threshold,
            training.unlabelled_weight,
        )
        self.measured = pool_sample(len(data.unlabelled_images), config.seed)

    def weights(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None = None) -> Tensor:
        return torch.ones(len(weak), device=weak.device)

    def measure(self, classifier: Classifier, trained: Tensor) -> None:
        """Take in the influences at `classifier`.

        Args:
            classifier: at the end of training.
            trained: indices of the images that it was trained on.
        """
        drawn = self.draw(len(trained), self.config.curvature_batch, "influence batch")
        solution = self._solve(classifier, *self._views(classifier, trained[drawn]))
        for part in self.measured.split(self.config.influence_batch):
            indices, _, strong, pseudo = self._views(classifier, part)
            # Also of images that do not reach τ yet: they are ranked as well.
            whole = replace(pseudo, mask=torch.ones_like(pseudo.mask))
            self._remember(indices, self._influence(classifier, strong, whole, solution.value))
