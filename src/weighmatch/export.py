"""A model that goes elsewhere: classifier and scores in one graph that needs no weighmatch.

The graph takes uint8 images (n, C, H, W) and gives probabilities (n, classes) and scores (n,).
"""

import json
import logging
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weighmatch.semisup.checkpoint import CPU, TrainedRun, on_device
from weighmatch.semisup.parts.backbones import Backbone

log = logging.getLogger(__name__)

INPUT, OUTPUTS = "images", ("probabilities", "scores")
# What ONNX needs beside torch: the extra `export`.
ONNX_NEEDS = ("onnx", "onnxscript")
RUN, PT2, ONNX, CLASSES, CARD = (
    "run.pt",
    "model.pt2",
    "model.onnx",
    "classes.json",
    "model_card.md",
)


class Portable(nn.Module):
    """A run as one module: uint8 images (n, C, H, W) -> probabilities (n, classes), scores (n,).

    Args:
        run: the run.
        device: where its networks are, and the images have to be.
    """

    def __init__(self, run: TrainedRun, device: torch.device = CPU) -> None:
        super().__init__()
        self.classifier = on_device(run.classifier, device)
        # A run on stored features has no backbone of its own.
        backbone = backbone_of(run) if run.config.training.frozen else None
        self.backbone = None if backbone is None else on_device(backbone, device)
        weighting = run._load_weighting(self.classifier, device)
        self.ranks = run._criterion(weighting, device)
        # An arm that ranks no new image scores each of them 1.
        self.tells_apart = run.config.row.weighs and run.config.row.inductive
        # The networks behind the criterion are registered, so that the graph has their parameters.
        parts = {**vars(weighting), **_enclosed(self.ranks)}
        modules = [part for part in parts.values() if isinstance(part, nn.Module)]
        self.parts = nn.ModuleList(part.eval() for part in modules)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch = images.float() / 255
        if self.backbone is not None:
            batch = self.backbone(batch)
        features = self.classifier.features(batch)
        logits = self.classifier.head(features)
        if not self.tells_apart:
            return logits.softmax(dim=1), torch.ones_like(logits[:, 0])
        return logits.softmax(dim=1), self.ranks(batch, features, logits).float()


def _enclosed(function: Any) -> dict[str, object]:
    """The variables that a function has from around it, by name."""
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def export_run(
    run: TrainedRun,
    folder: Path,
    facts: Mapping[str, object] | None = None,
    preparation: Mapping[str, str] | None = None,
) -> None:
    """Write a run as model.pt2, model.onnx, run.pt, classes.json and model_card.md.

    Without the extra `export` there is no ONNX file, and the log says so.

    Args:
        run: the run.
        folder: made if missing.
        facts: lines of the card's table, such as the number of labels, by name.
        preparation: how files became images: `fit` and `background` of `data.files.decode`; None:
            they were no files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run.save(folder / RUN)
    model = Portable(run).eval()
    example = torch.zeros((2, *run.image_shape), dtype=torch.uint8)
    shapes = {INPUT: {0: torch.export.Dim("n", min=1)}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        torch.export.save(program, folder / PT2)
        if has_onnx():
            _export_onnx(program, folder / ONNX)
        else:
            log.warning(
                "%s is not written, as onnx and onnxscript are not installed; "
                "uv sync --extra export installs them",
                ONNX,
            )
    classes = list(run.class_names) or [str(k) for k in range(run.config.classes)]
    description = {
        "classes": classes,
        "channels": run.image_shape[0],
        "height": run.image_shape[1],
        "width": run.image_shape[2],
        "input": f"{INPUT}: uint8 (n, channels, height, width), RGB or grey levels 0 to 255",
        "normalisation": normalisation_of(run),
        "preparation": dict(preparation or {}),
        "outputs": list(OUTPUTS),
        "cut": run.pool.cut,
    }
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / CLASSES).write_text(text + "\n", "utf-8")
    rows = {**_prepared(preparation or {}), **(facts or {})}
    (folder / CARD).write_text(model_card(run, classes, rows), "utf-8")


def has_onnx() -> bool:
    """Whether the extra `export` is installed."""
    try:
        for name in ONNX_NEEDS:
            import_module(name)
    except ImportError:
        return False
    return True


def _export_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    written = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    assert written is not None
    written.save(str(path), external_data=False)


def _prepared(preparation: Mapping[str, str]) -> dict[str, str]:
    """A row of the card's table on how a file becomes an image, if that is known."""
    if not preparation:
        return {}
    paper = preparation.get("background", "white")
    how = {
        "crop": "resized until it just covers that size, and cut at its centre",
        "pad": f"resized until it just fits into that size, and padded with {paper}",
    }[preparation.get("fit", "crop")]
    text = f"an image stands upright, on {paper} where it is transparent, and is {how} (bicubic)"
    return {"preparation": text}


def model_card(run: TrainedRun, classes: list[str], facts: Mapping[str, object]) -> str:
    """What the model is, what it takes and gives, and where it must not be trusted; Markdown."""
    channels, height, width = run.image_shape
    training = run.config.training
    size = sum(value.numel() for value in run.classifier.parameters())
    weights = ""
    if training.weights != "none":
        trained = "head" if training.frozen else f"head and {training.fine_tune} blocks"
        weights = f"weights {Path(training.weights).name}, {trained} trained, "
    if training.frozen and (backbone := backbone_of(run)) is not None:
        size += sum(value.numel() for value in backbone.parameters())
    table = {
        "classes": ", ".join(classes),
        "input": f"uint8 images (n, {channels}, {height}, {width}), "
        f"{'grey' if channels == 1 else 'RGB'} levels 0 to 255",
        "normalisation": normalisation_of(run),
        "outputs": f"probabilities (n, {len(classes)}) and scores (n,)",
        "network": f"{training.network}, {weights}{size:,} parameters",
        "training": f"{run.config.row.label}, schedule {run.config.schedule}, "
        f"{run.config.first_steps + run.config.steps:,} steps, seed {run.config.seed}",
        **facts,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    cut = run.pool.cut
    kept = "" if not cut else f" Of the pool, images above {cut:.3g} counted as useful."
    return (
        "# Image classifier trained by WeighMatch\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        "## Use\n\n"
        f"Prepare images as the table says. `{PT2}` needs torch alone "
        f"(`torch.export.load('{PT2}').module()`), `{ONNX}` needs onnxruntime alone, `{RUN}` is "
        f"read by `weighmatch.semisup.TrainedRun.load`. `{CLASSES}` names the outputs in order.\n\n"
        "The score says how useful an image would be for training: high for images that are like "
        f"the labelled ones.{kept}\n\n"
        "## Limits\n\n"
        "Probabilities are those of the network and are not calibrated: the report of the job says "
        "how far they can be trusted. An image of none of the classes still gets one; look at its "
        "score. The model learned from few labels, so that a mistake among them shows.\n"
    )


def backbone_of(run: TrainedRun) -> Backbone | None:
    """The network of torchvision or timm behind a run; None: it has another."""
    trunk = run.classifier.trunk
    if run.config.training.frozen:
        return run.backbone()
    return trunk if isinstance(trunk, Backbone) else None


def normalisation_of(run: TrainedRun) -> str:
    """What a run's graph does to pixels first, in words."""
    backbone = backbone_of(run)
    if backbone is None:
        return "x / 255 − 0.5, within the graph"
    mean, std = (
        ", ".join(f"{value:g}" for value in part)
        for part in (backbone.info.mean, backbone.info.std)
    )
    return f"(x / 255 − mean) / deviation, mean {mean}, deviation {std}, within the graph"


def read_preparation(folder: Path) -> dict[str, str]:
    """How files become images, as `export_run` wrote it to classes.json."""
    found: dict[str, str] = json.loads((folder / CLASSES).read_text("utf-8"))["preparation"]
    return found
