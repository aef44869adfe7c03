"""The loop: FixMatch with a weight on every unlabelled image, one step after another."""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.implicit.memory import keep_freed_memory
from weighmatch.semisup.checkpoint import (
    CPU,
    History,
    Parameters,
    PoolState,
    TrainedRun,
    load_classifier,
)
from weighmatch.semisup.parts.feature_classifier import fit_to_data, make_classifier
from weighmatch.semisup.parts.losses import fixmatch_loss, mean_one, pseudo_label
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.running import DistributionAlignment
from weighmatch.semisup.parts.state_file import State, read_if_whole, write_state
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.parts.views import make_views
from weighmatch.semisup.training.batches import Batch, Batches, first_half_of_each_class
from weighmatch.semisup.training.config import (
    RunConfig,
    TrainingSet,
    fingerprint,
    pick_device,
)
from weighmatch.semisup.training.log import Entry, RunLog
from weighmatch.semisup.weightings import Context, Weighting

log = logging.getLogger(__name__)

# How often a run whose numbers are no longer finite goes back to its last checkpoint, each time
# with half of the learning rate.
MAX_HALVINGS = 3


class Run:
    """The state of a run and how it moves; most callers want a schedule.

    Args:
        config: what defines the run.
        data: what it trains on.
        directory: made if missing; gets `checkpoint.pt` and `metrics.jsonl`. What it holds of
            another run (other data, seed, configuration or code) is replaced.
        start: parameters of the classifier to begin with; None: the seed's.
        until: the step that a checkpoint may not be beyond; None: the last.
        earlier: another folder to look for a checkpoint of this very run in.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TrainingSet,
        directory: Path,
        start: Parameters | None = None,
        until: int | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.config, self.training, self.data = config, config.training, data
        self.directory, self.group = directory, config.group
        self.fingerprint = fingerprint(config, data, start)
        self.group.require_same(lambda: self.fingerprint)
        self.device = pick_device(self.training.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.streams = Streams(config.seed)
        labelled = torch.from_numpy(data.labelled_images).to(self.device)
        labels = torch.from_numpy(data.labels).to(self.device)
        outer = (labelled, labels)
        weighting = Weighting.kind(config.row.weighting)
        held_out = self.training.weighting.outer_labels == "held_out"
        if weighting.lowers_outer_loss and held_out:
            kept = first_half_of_each_class(labels)
            if bool(kept.all()):
                raise ValueError(
                    "training.weighting.outer_labels: held_out needs data.labels_per_class of at "
                    "least 2; raise it or set outer_labels to training"
                )
            outer = (labelled[~kept], labels[~kept])
            labelled, labels = labelled[kept], labels[kept]
        pool = data.store(self.device, self.training.pool_memory, self.group)
        views = make_views(self.training)
        self.with_pool = config.row.pool != "none"
        self.batches = Batches(
            labelled, labels, pool, self.training, views, self.streams, self.with_pool, self.group
        )
        self._build_networks(pool, start)
        self.alignment: DistributionAlignment | None = None
        if self.training.distribution_alignment != (config.row.alignment == "opposite"):
            self.alignment = DistributionAlignment(labels, config.classes, self.group)
        self.weighting = weighting(
            Context(
                self.classifier,
                labelled,
                labels,
                outer,
                pool,
                config.classes,
                views,
                self.training,
                self.streams,
                self.alignment,
                self.group,
            )
        )
        self.step, self.seconds = 0, 0.0
        self.updates, self.update_seconds = 0, 0.0
        self.halvings, self.updates_skipped = 0, 0
        count = self.training.snapshots
        self._snapshot_steps = {round((k + 1) * config.steps / count) for k in range(count)}
        self.snapshots: list[tuple[int, Tensor, Tensor]] = []
        self.pool_labels: Tensor | None = None
        if self.group.first:
            directory.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(directory / "metrics.jsonl", self.group.first)
        self.saved: int | None = None  # the step of the checkpoint in `directory`
        self._resume(config.steps if until is None else until, earlier or directory)

    def _build_networks(self, pool: ImageStore, start: Parameters | None) -> None:
        """The classifier, its average and its optimiser."""
        training = self.training
        seed = derive_seed(self.config.seed, "initialisation of the classifier")
        stored = tuple(pool.shape[1:])
        self.classifier = make_classifier(training, stored, self.config.classes, seed)
        self.classifier = self.classifier.to(self.device)
        if start is None:
            fit_to_data(self.classifier, pool)
            self.group.unify(self.classifier.state_dict())
        else:
            self.classifier.load_state_dict(start)
        self.classifier = self.classifier.to(memory_format=self.batches.layout)
        self._forward: Callable[[Tensor], Tensor] = self.classifier
        if training.compile:
            self._forward = torch.compile(self.classifier)
        self.average = copy.deepcopy(self.classifier).requires_grad_(False)
        averages = dict(self.average.named_parameters())
        trained = {n: p for n, p in self.classifier.named_parameters() if p.requires_grad}
        self._tensors: list[Tensor] = list(trained.values())
        self._average_tensors: list[Tensor] = [averages[name] for name in trained]
        self.optimizer = torch.optim.SGD(
            decay_groups(self.classifier, training.weight_decay),
            lr=training.learning_rate,
            momentum=training.momentum,
            nesterov=True,
            fused=True,
        )

    # --- training ---------------------------------------------------------------------------

    def train_steps(self, limit: int | None = None) -> int:
        """Train for up to `limit` steps; write metrics and, where due, a checkpoint.

        Where a loss or a parameter is no longer finite, the run goes back to its last checkpoint
        and goes on with half of the learning rate.

        Returns:
            How many steps further the run is; 0 or less where it went back.

        Raises:
            FloatingPointError: if that was done `MAX_HALVINGS` times before.
        """
        started = time.perf_counter()
        size = min(limit or self.batches.chunk(), self.config.steps - self.step)
        before = self.step
        entries = [self._train_step(batch) for batch in self.batches.draw(size)]
        self.seconds += time.perf_counter() - started
        if not self._is_finite(entries, before):
            self._go_back()
            return self.step - before
        counted = {"updates_skipped": float(self.updates_skipped)} if self.updates_skipped else {}
        self._join_masks(entries)
        self.log.add(entries, step=self.step, seconds=round(self.seconds, 3), **counted)
        done = self.step >= self.config.steps
        every = self.training.checkpoint_every
        if done or self.step // every > before // every:
            self.save()
        return size

    def _join_masks(self, entries: list[Entry]) -> None:
        """Where each process has the masks of its own images, put the mean of all in their place.

        Once for many steps: nothing but the log needs it.
        """
        if self.group.size == 1 or "mask_rate" not in entries[0]:
            return
        masks = [torch.as_tensor(entry["mask_rate"]) for entry in entries]
        for entry, mean in zip(entries, self.group.mean(torch.stack(masks, dim=1)), strict=True):
            entry["mask_rate"] = mean

    def _is_finite(self, entries: list[Entry], before: int) -> bool:
        """Whether every loss and, after the last step, every parameter is finite; else it warns."""
        losses = torch.stack([torch.as_tensor(entry["loss"]) for entry in entries])
        # One number tells of all parameters, so that the device is waited for once.
        total = torch.stack(torch._foreach_norm(self._tensors)).sum()
        if bool(torch.isfinite(losses.sum() + total)):
            return True
        bad = (~torch.isfinite(losses)).nonzero()
        step = before + (int(bad[0]) + 1 if len(bad) else len(entries))
        if self.halvings >= MAX_HALVINGS:
            raise FloatingPointError(
                f"the loss is no longer finite after {step} steps, also with a learning rate that "
                f"was halved {self.halvings} times; lower training.learning_rate"
            )
        log.warning(
            "%s: the loss or a parameter is no longer finite after %d steps; the run goes back "
            "to step %d with half of the learning rate",
            self.config.arm,
            step,
            self.saved or 0,
        )
        return False

    def _go_back(self) -> None:
        """Return to the last checkpoint, or the start, with half of the learning rate."""
        halvings, seconds = self.halvings + 1, self.seconds
        state = None
        if self.saved is not None:
            path = self.directory / CHECKPOINT
            state = self.group.from_first(lambda: read_if_whole(path, "the run goes back further"))
        self._restore(self._initial if state is None else state)
        self.halvings, self.seconds = halvings, seconds

    def _train_step(self, batch: Batch) -> Entry:
        entry: Entry = {}
        if batch.weak is None:
            loss = F.cross_entropy(self._logits(batch.images), batch.labels)
            loss = loss * (len(batch.labels) / self.batches.batch)
        else:
            with torch.no_grad():
                weak_logits = self._logits(batch.weak)
                if self.alignment is not None:
                    self.alignment.observe(weak_logits)
                pseudo = pseudo_label(weak_logits, self.training.threshold, self.alignment)
            entry["mask_rate"] = pseudo.mask
            weights = None
            if self._weighs():
                weights = self.weighting.weights(batch.weak, pseudo, batch.indices)
                if not self.weighting.masks:
                    pseudo = replace(pseudo, mask=torch.ones_like(pseudo.mask))
            loss = fixmatch_loss(
                self._logits(batch.images),
                batch.labels,
                pseudo,
                weights,
                self.training.unlabelled_weight,
                (self.batches.batch, self.batches.unlabelled),
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate() * group["rate"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Every process has its part of the loss and of the gradient; the sums are the batch's.
        total = loss.detach()
        gradients = [tensor.grad for tensor in self._tensors if tensor.grad is not None]
        self.group.sum_([*gradients, total])
        self.optimizer.step()
        self._update_average()
        self.step += 1
        entry["loss"] = total
        due = self.step % self.training.weighting.interval == 0
        if self._weighs() and due and bool(torch.isfinite(total)):
            started = time.perf_counter()
            found = self.weighting.try_update(self.classifier)
            if found is None:
                self._warn_of_skipped()
            entry.update(found or {})
            self.updates += 1
            self.update_seconds += time.perf_counter() - started
        if self.step in self._snapshot_steps and self.with_pool:
            self._record_pool()
        return entry

    def _warn_of_skipped(self) -> None:
        """Count an update that was skipped, and say so the first time."""
        self.updates_skipped += 1
        if self.updates_skipped == 1:
            log.warning(
                "%s, seed %d: at step %d an update of the weights met numbers that are not finite "
                "and was skipped; the log counts those that are (updates_skipped)",
                self.config.arm,
                self.config.seed,
                self.step,
            )

    def _logits(self, images: Tensor) -> Tensor:
        """Logits by the precision of training; of bfloat16, given in single precision."""
        if self.training.precision != "bfloat16":
            return self._forward(images)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self._forward(images).float()

    def _update_average(self) -> None:
        """θ̄ ← θ̄ + (1 − decay)(θ − θ̄); the decay is less at first, so that θ̄ forgets its start.

        In one fused call: on a small network the bookkeeping of torch's AveragedModel shows.
        """
        decay = min(self.training.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self._average_tensors, self._tensors, 1 - decay)

    def _weighs(self) -> bool:
        if not self.config.row.weighs:
            return False
        return self.step >= self.training.weighting.warmup * self.config.steps

    def _learning_rate(self) -> float:
        phase = 7 * math.pi * self.step / (16 * self.config.steps)
        return self.training.learning_rate * math.cos(phase) * 0.5**self.halvings

    # --- records ----------------------------------------------------------------------------

    def _record_pool(self) -> None:
        """Weights and confidences of the whole pool, as it is, at this step.

        The confidence is that of the averaged classifier, without alignment: every arm's the same.
        """
        pool, group = self.batches.pool, self.group
        # Of each part every process looks at its share.
        parts = torch.arange(len(pool), device=self.device).split(1024 * group.size)
        with torch.no_grad():
            found = torch.cat([group.divide(self._of_pool, part) for part in parts])
        confidence, scores, labels = found.T.contiguous()
        self.snapshots.append((self.step, mean_one(scores).cpu(), confidence.cpu()))
        self.pool_labels = labels.long().cpu()

    def _of_pool(self, indices: Tensor) -> Tensor:
        """Confidence, weight and pseudo-label of images of the pool at `indices`, (n, 3)."""
        images = self.batches.arranged(self.batches.views.plain(self.batches.pool[indices]))
        confidence, labels = self.average(images).softmax(dim=1).max(dim=1)
        scores = torch.ones_like(confidence)
        if self._weighs():
            logits = self._logits(images)
            pseudo = pseudo_label(logits, self.training.threshold, self.alignment)
            scores = self.weighting.scores(images, pseudo, indices).to(scores.dtype)
        return torch.stack([confidence, scores, labels.to(scores.dtype)], dim=1)

    def result(self) -> TrainedRun:
        """The run as it stands."""
        state = {name: value.cpu() for name, value in self.average.state_dict().items()}
        meter = self.weighting.meter
        measured = None if meter is None else meter.measured.to(CPU)
        channels, height, width = self.data.image_shape
        return TrainedRun(
            config=self.config,
            classifier=load_classifier(self.config, state, self.data.image_shape),
            weighting=self.weighting.state_dict(),
            image_shape=(channels, height, width),
            class_names=self.data.class_names,
            backbone_digest=self.data.backbone,
            pool_fingerprint=self.data.pool_fingerprint,
            history=History.of(self.snapshots),
            pool=PoolState(labels=self.pool_labels, measured=measured),
            log=self.log.lines,
            seconds=self.seconds,
            update_seconds=self.update_seconds / self.updates if self.updates else None,
        )

    # --- checkpoints ------------------------------------------------------------------------

    def _state(self) -> State:
        return {
            "fingerprint": self.fingerprint,
            **{name: getattr(self, name) for name in _NUMBERS},
            **self._held(),
            "log": self.log.lines,
        }

    def _held(self) -> State:
        """What every process holds, the same bits in each of them."""
        return {
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "snapshots": self.snapshots,
            "pool_labels": self.pool_labels,
        }

    def save(self) -> None:
        """Write the checkpoint, in the first process; it does not depend on their number."""
        self.group.require_same(self._held)
        self.saved = self.step
        if self.group.first:
            write_state(self.directory / CHECKPOINT, self._state())

    def _restore(self, state: State) -> None:
        for name in _NUMBERS:
            setattr(self, name, state[name])
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        if self.alignment is not None:
            self.alignment.load_state_dict(state["alignment"])
        self.snapshots, self.pool_labels = list(state["snapshots"]), state["pool_labels"]
        self.log.restore(state["log"])

    def _resume(self, until: int, earlier: Path) -> None:
        """Go on from a checkpoint of this very run; anything else there is started over.

        Args:
            until: the step that a checkpoint may not be beyond.
            earlier: where to look for one if the run's own folder has none.
        """
        for folder in (self.directory, earlier):
            read = partial(read_if_whole, folder / CHECKPOINT, "what it held is trained again")
            state = self.group.from_first(read)
            if state is None or state["fingerprint"] != self.fingerprint:
                continue
            if state["step"] <= until:
                self._restore(state)
                self.saved = self.step if folder == self.directory else None
                break
        else:
            self.log.restore([])
        # Where a run without a checkpoint of its own goes back to.
        self._initial = copy.deepcopy(self._state())


CHECKPOINT = "checkpoint.pt"
# What a checkpoint repeats of a run: numbers, and parts that have a state.
_NUMBERS = ("step", "seconds", "updates", "updates_skipped", "update_seconds", "halvings")
_PARTS = ("classifier", "average", "optimizer", "weighting", "streams")


def decay_groups(classifier: Classifier, weight_decay: float) -> list[State]:
    """Groups for an optimiser in which kernels decay, and biases and norms do not.

    That is FixMatch's own choice (Sohn et al., 2020, its code). The learning rate is multiplied by
    the group's `rate`; parameters that are not trained are in none.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    parameters = dict(classifier.named_parameters())
    for name, rate in classifier.rates().items():
        groups.setdefault((rate, parameters[name].ndim > 1), []).append(parameters[name])
    return [
        {"params": members, "weight_decay": weight_decay if kernels else 0.0, "rate": rate}
        for (rate, kernels), members in groups.items()
    ]
