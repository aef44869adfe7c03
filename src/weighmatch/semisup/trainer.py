"""One training run: FixMatch with a weight on every unlabelled image, resumable."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.semisup.augmentation import Augmentation
from weighmatch.semisup.config import ArmName, TrainingConfig
from weighmatch.semisup.learned import Learned
from weighmatch.semisup.losses import PseudoLabels, fixmatch_loss, pseudo_label
from weighmatch.semisup.networks import build_classifier
from weighmatch.semisup.streams import Streams, derive_seed
from weighmatch.semisup.weightings import (
    MaxProbability,
    PositiveUnlabelled,
    Uniform,
    Weighting,
)

# Steps whose images are augmented together: one pass over many images instead of many passes.
CHUNK = 16


@dataclass(frozen=True)
class TrainingSet:
    """All that training may see: no test image, no word on which image is OOD.

    Attributes:
        labelled_images: (n, C, H, W) uint8.
        labels: (n,) int64, 0 to classes − 1.
        unlabelled_images: (N, C, H, W) uint8.
    """

    labelled_images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    unlabelled_images: NDArray[np.uint8]


def code_digest() -> str:
    """Identifies the code that trains and the version of torch; 16 hexadecimal digits."""
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for source in sorted([*package.glob("semisup/*.py"), *package.glob("implicit/*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RunConfig:
    """What defines a run beside its data.

    Attributes:
        arm: the weighting.
        seed: of every random stream.
        steps: of the classifier.
        classes: number of seen classes.
        training: the rest.
        code: what trains it. Fixed here, so that an edit while many runs go on splits none.
    """

    arm: ArmName
    seed: int
    steps: int
    classes: int
    training: TrainingConfig
    code: str = field(default_factory=code_digest)


class Trainer:
    """Trains one arm with one seed.

    The same data, seed and configuration give the same result to the bit on the CPU of the same
    machine with the same number of threads, whether or not the run was interrupted.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def fit(
        self,
        data: TrainingSet,
        checkpoint_dir: Path,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> dict[str, Any]:
        """Train to the last step, or go on from the last checkpoint, or return at once if done.

        Args:
            data: what to train on.
            checkpoint_dir: made if missing; gets `checkpoint.pt` and `metrics.jsonl`. What it
                holds of another run (other data, seed, configuration or code) is replaced.
            progress: called with the number of steps done since the last call.

        Returns:
            The final checkpoint: "classifier" (the EMA's state), "weighting", "history" (of the
            pool's weights and confidences, (snapshots, N)), "seconds" spent training, "config" and
            "metrics" (the lines of `metrics.jsonl`).

        Raises:
            FloatingPointError: if the loss is no longer finite.
            ValueError: if `checkpoint_dir` holds a damaged checkpoint.
        """
        run = Run(self.config, data, checkpoint_dir)
        progress(run.step)
        while run.step < self.config.steps:
            progress(run.train_steps())
        return run.result()


def fingerprint(config: RunConfig, data: TrainingSet) -> str:
    """Identifies a run: its configuration (code included) and data; 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for array in (data.labelled_images, data.labels, data.unlabelled_images):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class Run:
    """The state of a run and how it moves; most callers want `Trainer`."""

    def __init__(self, config: RunConfig, data: TrainingSet, directory: Path) -> None:
        self.config, self.training = config, config.training
        self.directory = directory
        self.fingerprint = fingerprint(config, data)
        self.device = pick_device(self.training.device)
        self.streams = Streams(config.seed)
        self.augmentation = Augmentation(self.training.augmentation)
        self._load_data(data)
        self.classifier = build_classifier(
            self.training.network,
            self.labelled.shape[1],
            config.classes,
            derive_seed(config.seed, "initialisation of the classifier"),
            self.training.width,
        ).to(self.device)
        self.average = copy.deepcopy(self.classifier).requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            lr=self.training.learning_rate,
            momentum=self.training.momentum,
            weight_decay=self.training.weight_decay,
            nesterov=True,
            fused=True,
        )
        self.weighting = self._build_weighting()
        self.step, self.seconds = 0, 0.0
        self.history: dict[str, list[Any]] = {"step": [], "weights": [], "confidence": []}
        directory.mkdir(parents=True, exist_ok=True)
        self._resume()

    # --- building ---------------------------------------------------------------------------

    def _load_data(self, data: TrainingSet) -> None:
        labelled = torch.from_numpy(data.labelled_images).to(self.device)
        labels = torch.from_numpy(data.labels).to(self.device)
        self.pool = torch.from_numpy(data.unlabelled_images).to(self.device)
        self.outer = (labelled, labels)
        self.labelled, self.labels = labelled, labels
        held_out = self.training.weighing.outer_labels == "held_out"
        if self.config.arm == "learned" and held_out:
            kept = _first_half_of_each_class(labels)
            if bool(kept.all()):
                raise ValueError(
                    "training.weighing.outer_labels: held_out needs data.labels_per_class of at "
                    "least 2; raise it or set outer_labels to training"
                )
            self.outer = (labelled[~kept], labels[~kept])
            self.labelled, self.labels = labelled[kept], labels[kept]

    def _build_weighting(self) -> Weighting:
        weighing = self.training.weighing
        if self.config.arm == "max_prob":
            return MaxProbability()
        if self.config.arm == "pu":
            return PositiveUnlabelled(
                self.labelled, self.labels, self.pool, self.augmentation, weighing, self.streams
            )
        if self.config.arm == "learned":
            return Learned(
                self.labelled,
                self.labels,
                self.outer,
                self.pool,
                self.augmentation,
                weighing,
                self.streams,
                self.training.threshold,
                self.training.unlabelled_weight,
            )
        return Uniform()

    # --- training ---------------------------------------------------------------------------

    def train_steps(self, limit: int = CHUNK) -> int:
        """Train for up to `limit` steps; write metrics and, where due, a checkpoint."""
        started = time.perf_counter()
        size = min(limit, self.config.steps - self.step)
        before = self.step
        losses = [self._train_step(*views) for views in self._views(size)]
        self.seconds += time.perf_counter() - started
        self._require_finite(float(torch.stack([entry["loss"] for entry in losses]).mean()))
        self._log(losses)
        done = self.step >= self.config.steps
        every = self.training.checkpoint_every
        if done or self.step // every > before // every:
            self._save()
        return size

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.config.arm}, seed {self.config.seed}: the loss is no longer finite after "
                f"{self.step} steps; lower training.learning_rate"
            )

    def _views(self, size: int) -> list[tuple[Tensor, ...]]:
        """Batches of `size` steps: labelled weak, labels, unlabelled weak, strong and indices."""
        batch, unlabelled = self.training.batch_size, self._unlabelled_batch()
        drawn = torch.randint(
            len(self.labelled), (size * batch,), generator=self.streams["labelled batches"]
        ).to(self.device)
        labelled = self.augmentation.weak(
            self.labelled[drawn], self.streams["augmentation of labelled images"]
        )
        columns = [labelled.split(batch), self.labels[drawn].split(batch)]
        if unlabelled:
            chosen = torch.randint(
                len(self.pool), (size * unlabelled,), generator=self.streams["unlabelled batches"]
            ).to(self.device)
            noise = self.streams["augmentation of unlabelled images"]
            columns.append(self.augmentation.weak(self.pool[chosen], noise).split(unlabelled))
            columns.append(self.augmentation.strong(self.pool[chosen], noise).split(unlabelled))
            columns.append(chosen.split(unlabelled))
        return list(zip(*columns, strict=True))

    def _unlabelled_batch(self) -> int:
        if self.config.arm == "supervised":
            return 0
        return self.training.batch_size * self.training.unlabelled_ratio

    def _train_step(
        self,
        labelled: Tensor,
        labels: Tensor,
        weak: Tensor | None = None,
        strong: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        if weak is None or strong is None:
            loss = F.cross_entropy(self.classifier(labelled), labels)
        else:
            with torch.no_grad():
                pseudo = pseudo_label(self.classifier(weak), self.training.threshold)
            weights = self._weights(weak, pseudo, indices)
            # Only what is differentiated shares a pass: the weak view needs no backward.
            logits = self.classifier(torch.cat([labelled, strong]))
            n = len(labelled)
            loss = fixmatch_loss(
                logits[:n], labels, logits[n:], pseudo, weights, self.training.unlabelled_weight
            )
            entry["mask_rate"] = pseudo.mask.mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._update_average()
        self.step += 1
        entry["loss"] = loss.detach()
        if self._weighs() and self.step % self.training.weighing.interval == 0:
            self._require_finite(float(loss.detach()))
            entry.update(self.weighting.update(self.classifier))
        if self.step in self._snapshot_steps():
            self._record_pool()
        return entry

    def _update_average(self) -> None:
        """θ̄ ← θ̄ + (1 − decay)(θ − θ̄); the decay is less at first, so that θ̄ forgets its start.

        In one fused call: on a small network the bookkeeping of torch's AveragedModel shows.
        """
        decay = min(self.training.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.classifier.parameters()), 1 - decay
            )

    def _weighs(self) -> bool:
        return self.step >= self.training.weighing.warmup * self.config.steps

    def _weights(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        if not self._weighs():
            return torch.ones_like(pseudo.confidence)
        return self.weighting.weights(weak, pseudo, indices)

    def _learning_rate(self) -> float:
        phase = 7 * math.pi * self.step / (16 * self.config.steps)
        return self.training.learning_rate * math.cos(phase)

    # --- records ----------------------------------------------------------------------------

    def _snapshot_steps(self) -> set[int]:
        count = self.training.snapshots
        return {round((k + 1) * self.config.steps / count) for k in range(count)}

    def _record_pool(self) -> None:
        """Weights and confidences of the whole pool, as it is, at this step."""
        if not self._unlabelled_batch():
            return
        images = self.pool.float() / 255
        with torch.no_grad():
            logits = torch.cat([self.classifier(part) for part in images.split(1024)])
            pseudo = pseudo_label(logits, self.training.threshold)
            everyone = torch.arange(len(self.pool), device=self.device)
            weights = self._weights(images, pseudo, everyone)
        self.history["step"].append(self.step)
        self.history["weights"].append(weights.cpu())
        self.history["confidence"].append(pseudo.confidence.cpu())

    def _log(self, entries: list[dict[str, Any]]) -> None:
        """One line of means over the chunk: a line a step would cost a device synchronisation."""
        line: dict[str, float] = {"step": self.step, "seconds": round(self.seconds, 3)}
        for name in sorted({name for entry in entries for name in entry}):
            values = [float(entry[name]) for entry in entries if name in entry]
            line[name] = sum(values) / len(values)
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def result(self) -> dict[str, Any]:
        """What `Trainer.fit` returns: tensors, numbers, strings and containers of them."""
        stacked = {
            name: torch.stack(values) if values and isinstance(values[0], Tensor) else values
            for name, values in self.history.items()
        }
        return {
            "classifier": self.average.state_dict(),
            "weighting": self.weighting.state_dict(),
            "history": stacked,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "metrics": [
                json.loads(line)
                for line in (self.directory / "metrics.jsonl").read_text().splitlines()
            ],
        }

    # --- checkpoints ------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "classifier": self.classifier.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            "streams": self.streams.state_dict(),
            "history": self.history,
        }
        target = self.directory / "checkpoint.pt"
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
        os.replace(partial, target)

    def _resume(self) -> None:
        """Go on from a checkpoint of this very run; anything else there is started over."""
        path, metrics = self.directory / "checkpoint.pt", self.directory / "metrics.jsonl"
        state = _load_checkpoint(path)
        if state is None or state["fingerprint"] != self.fingerprint:
            metrics.write_text("")
            return
        self.classifier.load_state_dict(state["classifier"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.weighting.load_state_dict(state["weighting"])
        self.streams.load_state_dict(state["streams"])
        self.history = state["history"]
        self.step, self.seconds = state["step"], state["seconds"]
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.step]
        metrics.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line of metrics; past every checkpoint where a kill cut the line."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def _load_checkpoint(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["fingerprint"]
    except Exception as error:  # damaged files make torch raise almost anything
        raise ValueError(
            f"{path} is not a whole checkpoint; delete its folder to train that run anew"
        ) from error
    return state


def _first_half_of_each_class(labels: Tensor) -> Tensor:
    """True for the first ⌈half⌉ of the images of each class, (n,)."""
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        kept[members[: (len(members) + 1) // 2]] = True
    return kept


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one.

    Raises:
        ValueError: if "cuda" is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device is cuda, but torch sees no GPU; set it to auto or cpu")
    return torch.device(name)
