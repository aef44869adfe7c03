"""A trained run: what training hands back, what scores images, and what is kept on disk."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weighmatch.checks import require_images
from weighmatch.semisup.parts.backbones import Backbone, load_backbone
from weighmatch.semisup.parts.feature_classifier import make_classifier
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.state_file import DamagedFileError, State, read_state, write_state
from weighmatch.semisup.parts.store import ImageStore, Stored, as_tensor
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.parts.views import make_views
from weighmatch.semisup.training.config import RunConfig
from weighmatch.semisup.training.decision import Evidence
from weighmatch.semisup.weightings import Context, Weighting
from weighmatch.semisup.weightings.base import confidence_weights
from weighmatch.semisup.weightings.head import ConfidenceHead
from weighmatch.semisup.weightings.meter import Measured

BATCH = 1024
# Images that a backbone sees at a time: its activations are large.
BACKBONE_BATCH = 32
CPU = torch.device("cpu")
Parameters = dict[str, Tensor]
# A line of the log: means over some steps.
LogLine = dict[str, float]
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Scored:
    """What a run says of n images.

    Attributes:
        probabilities: probabilities of the classes, (n, classes).
        scores: what ranks the images: the arm's own criterion (the Confidence Network's score,
            the confidence, the negative free energy, …), or 1 where it has none, (n,).
        weights: positive, mean 1 over the n images, (n,).
    """

    probabilities: NDArray[np.float64]
    scores: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass
class History:
    """Snapshots of the pool through training.

    Attributes:
        step: step of each of S snapshots; none for an arm without a pool.
        weights: weights of the N pool images, mean 1, (S, N).
        confidence: confidence of the averaged classifier in them, without alignment, (S, N).
    """

    step: list[int]
    weights: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, snapshots: list[tuple[int, Tensor, Tensor]]) -> "History":
        """Snapshots (step, weights, confidence) together."""
        if not snapshots:
            return cls([], torch.zeros(0, 0), torch.zeros(0, 0))
        steps, weights, confidence = zip(*snapshots, strict=True)
        return cls(list(steps), torch.stack(weights), torch.stack(confidence))


@dataclass
class PoolState:
    """What a run knows of the N images of its pool at its end; None where it knows nothing.

    Attributes:
        labels: the averaged classifier's pseudo-labels, (N,).
        scores: what the last ranking ranks by, (N,).
        cut: the score above which the last ranking takes an image for useful.
        kept: the images that the last ranking keeps, (N,) bool. The history has what each
            classifier was trained on.
        evidence: what that choice rests on.
        measured: their influences.
    """

    labels: Tensor | None = None
    scores: Tensor | None = None
    cut: float | None = None
    kept: Tensor | None = None
    evidence: Evidence | None = None
    measured: Measured | None = None


@dataclass
class Ranker:
    """What ranked the pool between stages or rounds, and ranks any image since.

    Attributes:
        weighting: name of the weighting, for its criterion.
        state: its state.
        classifier: parameters of the classifier whose features or outputs are ranked by; None:
            the run's own.
        head: parameters of the head on its features; None: the weighting's criterion ranks.
    """

    weighting: str
    state: State
    classifier: Parameters | None = None
    head: Parameters | None = None


@dataclass
class TrainedRun:
    """A finished run.

    Attributes:
        config: what defined it.
        classifier: the averaged classifier, in evaluation mode, on the CPU.
        weighting: state of its weighting.
        image_shape: (C, H, W) of the images that it was trained on.
        class_names: a name for each class, or ().
        pool_fingerprint: identifies the pool that it was trained on.
        history: snapshots of the pool.
        pool: what it knows of the pool at its end.
        ranker: what ranks images in the place of the weighting; None in the schedule online.
        log: the lines of `metrics.jsonl`, each with `step`, `seconds` and `loss`.
        seconds: time spent training, rankings included.
        update_seconds: mean time of one update of the weights or one ranking; None: there was
            none.
        backbone_digest: of the weights of a frozen backbone; "": unknown, or there is none.
    """

    config: RunConfig
    classifier: Classifier
    weighting: State
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    pool_fingerprint: str
    history: History
    pool: PoolState = field(default_factory=PoolState)
    ranker: Ranker | None = None
    log: list[LogLine] = field(default_factory=list)
    seconds: float = 0.0
    update_seconds: float | None = None
    backbone_digest: str = ""

    def backbone(self) -> Backbone:
        """The frozen backbone that computed the features.

        Raises:
            ValueError: if its file of weights is another one by now.
        """
        training = self.config.training
        found = load_backbone(training.network, training.weights)
        if self.backbone_digest not in ("", found.info.digest):
            raise ValueError(
                f"training.weights: {training.weights} has other weights of {training.network} "
                "than the run was trained with; put the old file back, or train again"
            )
        return found

    def mask_rate(self) -> float | None:
        """Share of the pool with a confidence of at least τ at the end; None without a pool."""
        if not self.history.step:
            return None
        passed = self.history.confidence[-1] >= self.config.training.threshold
        return float(passed.float().mean())

    # --- scoring ----------------------------------------------------------------------------

    def classify(self, images: Stored, device: torch.device = CPU) -> Tensor:
        """Probabilities of the classes, (n, classes) float32 on the CPU; see `score`."""
        classifier = on_device(self.classifier, device)
        images = self._checked(images)
        shown = self.inputs(images, device)
        # Filled rather than put together: small pieces between large ones would split up the heap.
        found = torch.empty(len(images), self.config.classes)
        with torch.no_grad():
            for batch, rows in zip(as_tensor(images).split(BATCH), found.split(BATCH), strict=True):
                rows.copy_(classifier(shown(batch.to(device))).softmax(dim=1))
        return found

    def score(self, images: Stored, device: torch.device = CPU) -> Scored:
        """Class probabilities, scores and weights of any images, without augmentation.

        Args:
            images: (n, C, H, W) uint8, whether or not they were in the pool; or, where the
                backbone is frozen, features of the images, (n, 1 or more views, width) float16.
            device: where the classifier runs.

        Raises:
            ValueError: if the images are of another type or shape than those trained on.
            FloatingPointError: if a probability or a score is not finite.
        """
        scored = self.score_unchecked(images, device)
        numbers = np.column_stack([scored.probabilities, scored.scores, scored.weights])
        wrong = int((~np.isfinite(numbers).all(axis=1)).sum())
        if wrong:
            raise FloatingPointError(
                f"{self.config.arm}, seed {self.config.seed}: the scores of {wrong} of "
                f"{len(numbers)} images are not finite; train it again with a lower "
                "training.learning_rate"
            )
        return scored

    def score_unchecked(self, images: Stored, device: torch.device = CPU) -> Scored:
        """`score`, for callers that look themselves whether all is finite."""
        images = self._checked(images)
        classifier = on_device(self.classifier, device)
        weighting = self._load_weighting(classifier, device)
        criterion = self._criterion(weighting, device)
        shown = self.inputs(images, device)
        probabilities = torch.empty(len(images), self.config.classes)
        scores = torch.empty(len(images), dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                rows = slice(start, start + BATCH)
                batch = shown(as_tensor(images[rows]).to(device))
                features = classifier.features(batch)
                logits = classifier.head(features)
                scores[rows] = criterion(batch, features, logits).cpu().double()
                probabilities[rows] = logits.softmax(dim=1)
            if self.ranker is None:
                weights = weighting.sized(scores)
            else:
                weights = confidence_weights(scores, self.pool.cut)
        return Scored(probabilities.double().numpy(), scores.numpy(), mean_one(weights).numpy())

    def inputs(self, images: Stored, device: torch.device = CPU) -> Callable[[Tensor], Tensor]:
        """What turns a batch of such images on the device into what the classifier takes."""
        training = self.config.training
        if not training.frozen or images.ndim == 3:
            return make_views(training).plain
        backbone = on_device(self.backbone(), device)

        def shown(batch: Tensor) -> Tensor:
            parts = batch.split(BACKBONE_BATCH)
            return torch.cat([backbone(part.float() / 255) for part in parts])

        return shown

    def _checked(self, images: Stored) -> Stored:
        width = self.classifier.head.in_features
        if self.config.training.frozen and images.dtype == np.float16 and images.ndim == 3:
            if images.shape[2] != width:
                raise ValueError(
                    f"the classifier was trained on features of width {width}, these are of width "
                    f"{images.shape[2]}; compute them with the same backbone"
                )
            return images
        images = require_images("images", images)
        trained = self.image_shape
        if tuple(images.shape[1:]) != tuple(trained):
            raise ValueError(
                f"the classifier was trained on images of {trained[0]} channel(s), {trained[1]} by "
                f"{trained[2]}, these are of {images.shape[1]}, {images.shape[2]} by "
                f"{images.shape[3]}; convert or resize them"
            )
        return images

    def _load_weighting(self, classifier: Classifier, device: torch.device) -> Weighting:
        name = self.config.row.weighting if self.ranker is None else self.ranker.weighting
        state = self.weighting if self.ranker is None else self.ranker.state
        nothing: Stored = np.zeros((0, *self.image_shape), np.uint8)
        if self.config.training.frozen:
            nothing = np.zeros((0, 1, classifier.head.in_features), np.float16)
        images = torch.from_numpy(nothing).to(device)
        labels = torch.zeros(0, dtype=torch.long, device=device)
        context = Context(
            classifier,
            images,
            labels,
            (images, labels),
            ImageStore(nothing, device, "device"),
            self.config.classes,
            make_views(self.config.training),
            self.config.training,
            Streams(self.config.seed),
        )
        weighting = Weighting.kind(name)(context)
        if state:
            weighting.load_state_dict(state)
        return weighting

    def _criterion(self, weighting: Weighting, device: torch.device) -> Criterion:
        """What ranks images: scores (n,) from images, the run's features and its outputs."""
        ranker = self.ranker
        if ranker is None:
            return lambda images, features, logits: weighting.criterion(
                images, lambda: features, logits
            )
        other = None
        if ranker.classifier is not None:
            other = load_classifier(self.config, ranker.classifier, self.image_shape)
            other = other.to(device)
        head = None
        if ranker.head is not None:
            head = ConfidenceHead.from_state(ranker.head, self.config.classes)
            head.to(device)

        def score(images: Tensor, features: Tensor, logits: Tensor) -> Tensor:
            if other is not None:
                features = other.features(images)
                logits = other.head(features)
            if head is not None:
                return torch.sigmoid(head(features))
            return weighting.criterion(images, lambda: features, logits)

        return score

    # --- files ------------------------------------------------------------------------------

    def to_state(self) -> State:
        """Nested containers of tensors, numbers and strings."""
        own = (
            *("weighting", "pool_fingerprint", "log", "seconds", "update_seconds"),
            "backbone_digest",
        )
        pool = {**vars(self.pool)}
        measured, evidence = pool.pop("measured"), pool.pop("evidence")
        return {
            **{name: getattr(self, name) for name in own},
            "config": self.config.to_dict(),
            "classifier": self.classifier.state_dict(),
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "history": vars(self.history),
            "pool": pool,
            "measured": None if measured is None else vars(measured),
            "evidence": None if evidence is None else vars(evidence),
            "ranker": None if self.ranker is None else vars(self.ranker),
        }

    @classmethod
    def from_state(cls, state: State) -> "TrainedRun":
        """The run that `to_state` described."""
        state = dict(state)
        measured, ranker = state.pop("measured"), state["ranker"]
        evidence = state.pop("evidence")
        config = RunConfig.from_dict(state["config"])
        channels, height, width = state["image_shape"]
        shape = (channels, height, width)
        return cls(
            **{
                **state,
                "config": config,
                "classifier": load_classifier(config, state["classifier"], shape),
                "image_shape": shape,
                "class_names": tuple(state["class_names"]),
                "history": History(**state["history"]),
                "pool": PoolState(
                    **state["pool"],
                    evidence=None if evidence is None else Evidence(**evidence),
                    measured=None if measured is None else Measured(**measured),
                ),
                "ranker": None if ranker is None else Ranker(**ranker),
            }
        )

    def save(self, path: Path | str) -> None:
        """Write the run to one file, whole or not at all."""
        write_state(Path(path), self.to_state())

    @classmethod
    def load(cls, path: Path | str) -> "TrainedRun":
        """The run that `save` wrote; runs no code from the file.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if its content is not what was written, or of another version.
        """
        state = read_state(Path(path))
        if state is None:
            raise FileNotFoundError(f"there is no trained run at {path}")
        try:
            return cls.from_state(state)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise DamagedFileError(
                f"{path} is no trained run of this version; train it anew ({error})"
            ) from error


def load_classifier(
    config: RunConfig, state: Parameters, image_shape: tuple[int, ...]
) -> Classifier:
    """A classifier with these parameters for images (C, H, W), in evaluation mode, on the CPU."""
    stored = image_shape
    if config.training.frozen:
        stored = (1, state["head.weight"].shape[1])
    classifier = make_classifier(config.training, stored, config.classes, 0, filled=False)
    classifier.load_state_dict(state)
    return classifier.eval()


def on_device(network: Network, device: torch.device) -> Network:
    """The network, which is on the CPU, or on another device a copy of it."""
    if device.type == "cpu":
        return network
    return copy.deepcopy(network).to(device)
