"""One training run: FixMatch with a weight on every unlabelled image, resumable."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.checks import require_choice, require_images, require_integer
from weighmatch.implicit.memory import keep_freed_memory
from weighmatch.semisup.config import ARMS, OUTER_ARMS, REALIGNED, ArmName, TrainingConfig
from weighmatch.semisup.controls import (
    Energy,
    FreeWeights,
    InlierFilter,
    SoftMatch,
    SoftmaxWeights,
)
from weighmatch.semisup.learned import Learned
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import fixmatch_loss, mean_one, pseudo_label
from weighmatch.semisup.parts.networks import build_classifier
from weighmatch.semisup.parts.running import DistributionAlignment
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.weightings import (
    MaxProbability,
    PositiveUnlabelled,
    Uniform,
    Weighting,
)

# Steps whose images are augmented together, and the bytes that their views may take: one pass
# over many images instead of many passes.
CHUNK, CHUNK_BYTES = 100, 2**28


@dataclass(frozen=True)
class TrainingSet:
    """All that training may see: no test image, no word on which image is OOD.

    Attributes:
        labelled_images: (n, C, H, W) uint8, C 1 or 3.
        labels: (n,) int64, 0 to classes − 1.
        unlabelled_images: (N, C, H, W) uint8, N at least 1.

    Raises:
        ValueError: if they are not that; labels of another integer type are converted.
    """

    labelled_images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    unlabelled_images: NDArray[np.uint8]

    def __post_init__(self) -> None:
        for name in ("labelled_images", "unlabelled_images"):
            object.__setattr__(self, name, require_images(name, getattr(self, name)))
        mine, theirs = self.labelled_images.shape, self.unlabelled_images.shape
        if mine[1:] != theirs[1:]:
            raise ValueError(
                f"labelled_images are of shape {mine[1:]} each and unlabelled_images of "
                f"{theirs[1:]}; resize or convert them to the same"
            )
        labels = np.asarray(self.labels)
        whole = np.issubdtype(labels.dtype, np.integer)
        if labels.shape != mine[:1] or not whole or labels.min() < 0:
            raise ValueError(
                f"labels must be whole numbers from 0, one for each of the {mine[0]} labelled "
                f"images, got {labels.dtype} of shape {labels.shape}; number the classes from 0"
            )
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))


def code_digest() -> str:
    """Identifies the code that trains and the version of torch; 16 hexadecimal digits."""
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for source in sorted([*package.glob("semisup/**/*.py"), *package.glob("implicit/*.py")]):
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

    Raises:
        ValueError: if the arm is unknown, or a number is not a whole one.
    """

    arm: ArmName
    seed: int
    steps: int
    classes: int
    training: TrainingConfig
    code: str = field(default_factory=code_digest)

    def __post_init__(self) -> None:
        require_choice("arm", self.arm, ARMS)
        for name, minimum in (("seed", 0), ("steps", 1), ("classes", 1)):
            require_integer(name, getattr(self, name), minimum)

    def check_labels(self, data: TrainingSet) -> None:
        """Raise a ValueError if a label of `data` is none of the classes."""
        highest = int(data.labels.max())
        if highest >= self.classes:
            raise ValueError(
                f"labels go up to {highest}, so that there are {highest + 1} classes or more, but "
                f"RunConfig.classes is {self.classes}; raise it or number the classes from 0"
            )


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
        start: dict[str, Tensor] | None = None,
        until: int | None = None,
        earlier: Path | None = None,
    ) -> dict[str, Any]:
        """Train to the last step, or go on from the last checkpoint, or return at once if done.

        A run that stops at some step and goes on in another folder ends as one that never stopped,
        but for where the lines of metrics are cut.

        Args:
            data: what to train on.
            checkpoint_dir: made if missing; gets `checkpoint.pt` and `metrics.jsonl`. What it
                holds of another run (other data, seed, configuration or code) is replaced.
            progress: called with the number of steps done since the last call.
            start: state of the classifier to begin with; None: the seed's.
            until: the step to stop at; None: the last.
            earlier: where a call that stopped before left this run's checkpoint, to go on from
                if `checkpoint_dir` holds none.

        Returns:
            The checkpoint at that step: "classifier" (the EMA's state), "weighting", "history"
            (of the pool's weights and confidences, (snapshots, N)), "seconds" spent training,
            "update_seconds" that one update of the weights took (NaN: there was none), "config",
            "image_shape" (C, H, W) and "metrics" (the lines of `metrics.jsonl`).

        Raises:
            FloatingPointError: if the loss is no longer finite.
            ValueError: if `checkpoint_dir` holds a damaged checkpoint, or a label is no class.
        """
        self.config.check_labels(data)
        with algorithms(self.config.training.deterministic):
            run = Run(self.config, data, checkpoint_dir, start, until, earlier)
            progress(run.step)
            last = self.config.steps if until is None else until
            while run.step < last:
                progress(run.train_steps(min(run.chunk(), last - run.step)))
            if run.step != run.saved:
                run.save()
            return run.result()


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Repeatable algorithms, or else, on a GPU, the fastest for the shapes at hand.

    Either way single precision is that, in convolutions, too, which cuDNN would cut to 10 bits
    (TF32): curvature products and hypergradients rely on it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cudnn.allow_tf32
    if deterministic:
        # cuBLAS reads it when a process first multiplies matrices on the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic or before[0])
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.backends.cudnn.allow_tf32 = tf32


def fingerprint(
    config: RunConfig, data: TrainingSet, start: dict[str, Tensor] | None = None
) -> str:
    """Identifies a run: configuration (code included), data, start; 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    arrays: list[NDArray[Any]] = [data.labelled_images, data.labels, data.unlabelled_images]
    if start is not None:
        arrays += [value.cpu().numpy() for value in start.values()]
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class Batch(NamedTuple):
    """What a step sees: B labelled images and µB unlabelled ones, n of both together.

    Attributes:
        images: labelled weak views and after them the strong views, (n, C, H, W).
        labels: (B,).
        weak: weak views, (µB, C, H, W).
        indices: of the unlabelled images in the pool, (µB,).
    """

    images: Tensor
    labels: Tensor
    weak: Tensor | None = None
    indices: Tensor | None = None


class Run:
    """The state of a run and how it moves; most callers want `Trainer`."""

    def __init__(
        self,
        config: RunConfig,
        data: TrainingSet,
        directory: Path,
        start: dict[str, Tensor] | None = None,
        until: int | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.config, self.training = config, config.training
        self.directory = directory
        self.fingerprint = fingerprint(config, data, start)
        self.device = pick_device(self.training.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._layout = (
            torch.channels_last if self.training.channels_last else torch.contiguous_format
        )
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
        if start is not None:
            self.classifier.load_state_dict(start)
        self.classifier = self.classifier.to(memory_format=self._layout)
        self._forward: Callable[[Tensor], Tensor] = self.classifier
        if self.training.compile:
            self._forward = torch.compile(self.classifier)
        self.average = copy.deepcopy(self.classifier).requires_grad_(False)
        self._tensors: list[Tensor] = list(self.classifier.parameters())
        self._average_tensors: list[Tensor] = list(self.average.parameters())
        self.optimizer = torch.optim.SGD(
            self._tensors,
            lr=self.training.learning_rate,
            momentum=self.training.momentum,
            weight_decay=self.training.weight_decay,
            nesterov=True,
            fused=True,
        )
        self.alignment: DistributionAlignment | None = None
        if self.training.distribution_alignment != (config.arm == REALIGNED):
            self.alignment = DistributionAlignment(self.labels, config.classes)
        self.weighting = self._build_weighting()
        self.step, self.seconds = 0, 0.0
        self.updates, self.update_seconds = 0, 0.0
        count = self.training.snapshots
        self._snapshots = {round((k + 1) * config.steps / count) for k in range(count)}
        self.history: dict[str, list[Any]] = {"step": [], "weights": [], "confidence": []}
        directory.mkdir(parents=True, exist_ok=True)
        self.saved: int | None = None  # the step of the checkpoint in `directory`
        self._resume(config.steps if until is None else until, earlier or directory)

    # --- building ---------------------------------------------------------------------------

    def _load_data(self, data: TrainingSet) -> None:
        labelled = torch.from_numpy(data.labelled_images).to(self.device)
        labels = torch.from_numpy(data.labels).to(self.device)
        self.pool = ImageStore(data.unlabelled_images, self.device, self.training.pool_memory)
        self.outer = (labelled, labels)
        self.labelled, self.labels = labelled, labels
        held_out = self.training.weighing.outer_labels == "held_out"
        if self.config.arm in OUTER_ARMS and held_out:
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
        if self.config.arm == "softmatch":
            return SoftMatch(self.device)
        if self.config.arm == "energy":
            return Energy(self.pool, self.streams)
        if self.config.arm == "inlier":
            return InlierFilter(
                self.classifier,
                self.labelled,
                self.labels,
                self.augmentation,
                weighing,
                self.streams,
            )
        if self.config.arm == "pu":
            return PositiveUnlabelled(
                self.labelled, self.labels, self.pool, self.augmentation, weighing, self.streams
            )
        if self.config.arm in OUTER_ARMS:
            kinds: dict[str, Callable[..., Learned]] = {
                "ds3l": partial(SoftmaxWeights, self.config.classes),
                "free": FreeWeights,
                "learned": Learned,
            }
            return kinds[self.config.arm](
                self.labelled,
                self.labels,
                self.outer,
                self.pool,
                self.augmentation,
                weighing,
                self.streams,
                self.training.threshold,
                self.training.unlabelled_weight,
                self.alignment,
            )
        return Uniform()

    # --- training ---------------------------------------------------------------------------

    def train_steps(self, limit: int | None = None) -> int:
        """Train for up to `limit` steps; write metrics and, where due, a checkpoint."""
        started = time.perf_counter()
        size = min(limit or self.chunk(), self.config.steps - self.step)
        before = self.step
        losses = [self._train_step(batch) for batch in self._views(size)]
        self.seconds += time.perf_counter() - started
        self._require_finite(float(torch.stack([entry["loss"] for entry in losses]).mean()))
        self._log(losses)
        done = self.step >= self.config.steps
        every = self.training.checkpoint_every
        if done or self.step // every > before // every:
            self.save()
        return size

    def chunk(self) -> int:
        """How many steps' images are augmented together; no result depends on it."""
        views = self.training.batch_size + 2 * self._unlabelled_batch()
        return max(1, min(CHUNK, CHUNK_BYTES // (4 * views * self.pool.shape[1:].numel())))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.config.arm}, seed {self.config.seed}: the loss is no longer finite after "
                f"{self.step} steps; lower training.learning_rate (in the benchmark that of its "
                "source, such as benchmark.glyphs.training.learning_rate)"
            )

    def _views(self, size: int) -> list["Batch"]:
        """Batches of `size` steps."""
        batch, unlabelled = self.training.batch_size, self._unlabelled_batch()
        drawn = torch.randint(
            len(self.labelled), (size * batch,), generator=self.streams["labelled batches"]
        )
        drawn = drawn.to(self.device, non_blocking=True)
        labelled = self.augmentation.weak(
            self.labelled[drawn], self.streams["augmentation of labelled images"]
        )
        labels = self.labels[drawn].split(batch)
        if not unlabelled:
            parts = self._arranged(labelled).split(batch)
            return [Batch(*pair) for pair in zip(parts, labels, strict=True)]
        chosen = torch.randint(
            len(self.pool), (size * unlabelled,), generator=self.streams["unlabelled batches"]
        )
        images = self.pool[chosen]
        weak = self.augmentation.weak(images, self.streams["weak views of unlabelled images"])
        weak_batches = self._arranged(weak).split(unlabelled)
        strong = self.augmentation.strong(images, self.streams["strong views of unlabelled images"])
        # Only what is differentiated shares a pass: the weak view needs no backward.
        both = torch.cat(
            [labelled.unflatten(0, (size, batch)), strong.unflatten(0, (size, unlabelled))], dim=1
        )
        together = self._arranged(both.flatten(0, 1)).split(batch + unlabelled)
        indices = chosen.to(self.device, non_blocking=True).split(unlabelled)
        columns = zip(together, labels, weak_batches, indices, strict=True)
        return [Batch(*parts) for parts in columns]

    def _unlabelled_batch(self) -> int:
        if self.config.arm == "supervised":
            return 0
        return self.training.batch_size * self.training.unlabelled_ratio

    def _train_step(self, batch: "Batch") -> dict[str, Any]:
        entry: dict[str, Any] = {}
        if batch.weak is None:
            loss = F.cross_entropy(self._logits(batch.images), batch.labels)
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
            )
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
            started = time.perf_counter()
            entry.update(self.weighting.update(self.classifier))
            self.updates += 1
            self.update_seconds += time.perf_counter() - started
        if self.step in self._snapshots:
            self._record_pool()
        return entry

    def _logits(self, images: Tensor) -> Tensor:
        """In the precision of training, given in single precision."""
        if self.training.precision == "float32":
            return self._forward(images)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self._forward(images).float()

    def _arranged(self, images: Tensor) -> Tensor:
        """In the memory layout of training."""
        return images.contiguous(memory_format=self._layout)

    def _update_average(self) -> None:
        """θ̄ ← θ̄ + (1 − decay)(θ − θ̄); the decay is less at first, so that θ̄ forgets its start.

        In one fused call: on a small network the bookkeeping of torch's AveragedModel shows.
        """
        decay = min(self.training.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self._average_tensors, self._tensors, 1 - decay)

    def _weighs(self) -> bool:
        if isinstance(self.weighting, Uniform):
            return False
        return self.step >= self.training.weighing.warmup * self.config.steps

    def _learning_rate(self) -> float:
        phase = 7 * math.pi * self.step / (16 * self.config.steps)
        return self.training.learning_rate * math.cos(phase)

    # --- records ----------------------------------------------------------------------------

    def _record_pool(self) -> None:
        """Weights and confidences of the whole pool, as it is, at this step.

        The confidence is that of the averaged classifier, without alignment: every arm's the same.
        """
        if not self._unlabelled_batch():
            return
        everyone = torch.arange(len(self.pool), device=self.device)
        found = []
        with torch.no_grad():
            for part in everyone.split(1024):
                images = self._arranged(self.pool[part].float() / 255)
                confidence = self.average(images).softmax(dim=1).amax(dim=1)
                scores = torch.ones_like(confidence)
                if self._weighs():
                    logits = self._logits(images)
                    pseudo = pseudo_label(logits, self.training.threshold, self.alignment)
                    scores = self.weighting.scores(images, pseudo, part)
                found.append((scores, confidence))
        scores, confidence = (torch.cat(column) for column in zip(*found, strict=True))
        weights = mean_one(scores)
        self.history["step"].append(self.step)
        self.history["weights"].append(weights.cpu())
        self.history["confidence"].append(confidence.cpu())

    def _log(self, entries: list[dict[str, Any]]) -> None:
        """One line of means over the chunk: a line a step would cost a device synchronisation."""
        line: dict[str, float] = {"step": self.step, "seconds": round(self.seconds, 3)}
        for name in sorted({name for entry in entries for name in entry}):
            values = [entry[name] for entry in entries if name in entry]
            on_device = isinstance(values[0], Tensor)
            mean = torch.stack(values).mean() if on_device else sum(values) / len(values)
            line[name] = float(mean)
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
            "update_seconds": self.update_seconds / self.updates if self.updates else math.nan,
            "config": asdict(self.config),
            "image_shape": list(self.pool.shape[1:]),
            "metrics": [
                json.loads(line)
                for line in (self.directory / "metrics.jsonl").read_text().splitlines()
            ],
        }

    # --- checkpoints ------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint."""
        self.saved = self.step
        state = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "updates": self.updates,
            "update_seconds": self.update_seconds,
            "classifier": self.classifier.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "streams": self.streams.state_dict(),
            "history": self.history,
        }
        target = self.directory / "checkpoint.pt"
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
        os.replace(partial, target)

    def _resume(self, until: int, earlier: Path) -> None:
        """Go on from a checkpoint of this very run; anything else there is started over.

        Args:
            until: the step that a checkpoint may not be beyond.
            earlier: where to look for one if the run's own folder has none.
        """
        metrics = self.directory / "metrics.jsonl"
        for folder in (self.directory, earlier):
            state = load_state(folder / "checkpoint.pt")
            if state is None or state["fingerprint"] != self.fingerprint:
                continue
            if state["step"] <= until:
                break
        else:
            metrics.write_text("")
            return
        self.classifier.load_state_dict(state["classifier"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.weighting.load_state_dict(state["weighting"])
        if self.alignment is not None:
            self.alignment.load_state_dict(state["alignment"])
        self.streams.load_state_dict(state["streams"])
        self.history = state["history"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved = self.step if folder == self.directory else None
        self.updates, self.update_seconds = state["updates"], state["update_seconds"]
        found = folder / metrics.name
        lines = found.read_text().splitlines() if found.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.step]
        metrics.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line of metrics; past every checkpoint where a kill cut the line."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def load_state(path: Path) -> dict[str, Any] | None:
    """What `path` holds, with its "fingerprint"; none if there is no such file.

    Raises:
        ValueError: if the file is damaged.
    """
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
