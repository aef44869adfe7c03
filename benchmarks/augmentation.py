"""Pairs of weak and strong views a second: ours, Pillow's, torchvision's, kornia's.

FixMatch draws other operations for every image. Batched RandAugment of torchvision and kornia
draws once for a whole batch; an image at a time, both draw as they should.
"""

import random
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from benchmarks.tables import markdown, spread
from benchmarks.timing import by_turns
from weighmatch.implicit.memory import keep_freed_memory
from weighmatch.semisup.config import OPERATIONS, AugmentationConfig
from weighmatch.semisup.parts.augmentation import Augmentation

Views = Callable[[Tensor], object]


def images_of(count: int, side: int = 32, device: str = "cpu") -> Tensor:
    """Colour noise, uint8 (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def ours() -> Views:
    """Every operation once a batch, on the images that drew it."""
    augmentation, generator = Augmentation(AugmentationConfig()), torch.Generator().manual_seed(0)

    def views(images: Tensor) -> object:
        return augmentation.weak(images, generator), augmentation.strong(images, generator)

    return views


def pillow() -> Views:
    """An image at a time, operation by operation, as FixMatch's PyTorch ports do it."""
    rng = random.Random(0)

    def shifted(array: Any) -> Image.Image:
        height, width = array.shape[:2]
        padded = np.pad(array, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        y, x = rng.randint(0, 8), rng.randint(0, 8)
        return Image.fromarray(padded[y : y + height, x : x + width])

    def tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)

    def views(images: Tensor) -> object:
        arrays = images.permute(0, 2, 3, 1).numpy()
        weak, strong = [], []
        for array in arrays:
            weak.append(tensor(shifted(array)))
            image = shifted(array)
            for name in rng.choices(OPERATIONS, k=2):
                image = _distorted(image, name, rng)
            strong.append(tensor(_erased(image, rng)))
        return torch.stack(weak), torch.stack(strong)

    return views


def _distorted(image: Image.Image, name: str, rng: random.Random) -> Image.Image:
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    side, amount = image.width, rng.uniform(-0.3, 0.3)
    matrices = {
        "shear_x": (1, amount, -amount * side / 2, 0, 1, 0),
        "shear_y": (1, 0, 0, amount, 1, -amount * side / 2),
        "translate_x": (1, 0, amount * side, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, amount * side),
    }
    if name in enhancers:
        return enhancers[name](image).enhance(rng.uniform(0.05, 0.95))
    if name in matrices:
        transform, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return image.transform(image.size, transform, matrices[name], bilinear)
    if name == "rotate":
        return image.rotate(100 * amount, Image.Resampling.BILINEAR)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "posterize":
        return ImageOps.posterize(image, rng.randint(4, 8))
    return ImageOps.solarize(image, rng.randint(0, 256)) if name == "solarize" else image


def _erased(image: Image.Image, rng: random.Random) -> Image.Image:
    half = image.width // 4
    x, y = rng.randrange(image.width), rng.randrange(image.height)
    square = (x - half, y - half, x + half - 1, y + half - 1)
    ImageDraw.Draw(image).rectangle(square, fill=(0, 0, 0))
    return image


def torchvision(*, each: bool) -> Views:
    """Its transforms v2 on tensors: the batch at once, or an image at a time."""
    v2 = import_module("torchvision.transforms.v2")
    scale = v2.ToDtype(torch.float32, scale=True)
    shift = v2.RandomCrop(32, padding=4, padding_mode="reflect")
    weak = v2.Compose([shift, scale])
    erase = v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    strong = v2.Compose([shift, v2.RandAugment(num_ops=2), scale, erase])

    def views(images: Tensor) -> object:
        if not each:
            return weak(images), strong(images)
        return torch.stack([weak(x) for x in images]), torch.stack([strong(x) for x in images])

    return views


def kornia() -> Views:
    """Its augmentations on a batch of floats."""
    augmentation = import_module("kornia.augmentation")
    shift = augmentation.RandomCrop((32, 32), padding=4, padding_mode="reflect")
    policy = augmentation.auto.RandAugment(n=2, m=10)
    erase = augmentation.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))

    def views(images: Tensor) -> object:
        floats = images.float() / 255
        return shift(floats), erase(policy(shift(floats)))

    return views


FIELD: dict[str, tuple[Callable[[], Views], str]] = {
    "weighmatch": (ours, "image"),
    "Pillow": (pillow, "image"),
    "torchvision v2, one by one": (lambda: torchvision(each=True), "image"),
    "torchvision v2": (lambda: torchvision(each=False), "batch"),
    "kornia": (kornia, "batch"),
}


def beside_others(count: int, rounds: int) -> list[str]:
    """Pairs a second of everybody who is installed, and how many of theirs ours make."""
    keep_freed_memory()  # as training does
    images = images_of(count)
    calls: dict[str, Callable[[], object]] = {}
    missing = []
    for name, (build, _) in FIELD.items():
        try:
            views = build()
        except ImportError:
            missing.append(name)
        else:
            calls[name] = partial(views, images)
    times = by_turns(calls, rounds)
    rows = []
    for name, found in times.items():
        ratios = [theirs / own for own, theirs in zip(times["weighmatch"], found, strict=True)]
        rate = f"{count / statistics.median(found):,.0f}"
        rows.append([name, FIELD[name][1], rate, spread(ratios)])
    table = markdown(["augmentation", "draws per", "pairs a second", "ours / theirs"], rows)
    left_out = f"Not installed: {', '.join(missing)} (uv run --group peers)."
    return [*table, "", left_out] if missing else table


def scaling(counts: list[int], rounds: int, device: str) -> list[str]:
    """Pairs a second of ours against the images of a batch."""
    keep_freed_memory()
    views = ours()
    batches = {f"{count:,}": images_of(count, device=device) for count in counts}
    calls = {name: partial(views, batch) for name, batch in batches.items()}
    times = by_turns(calls, rounds)
    rates = [
        f"{len(batches[name]) / statistics.median(found):,.0f}" for name, found in times.items()
    ]
    return markdown(["images in a batch", *batches], [["pairs a second", *rates]])
