"""Weak and strong augmentation of a batch, another draw for every image.

torchvision's transforms draw one operation for a whole batch; FixMatch (Sohn et al., 2020)
needs RandAugment (Cubuk et al., 2020) image by image. Here every image has its own operations
and magnitudes, and each operation runs once, on all the images that drew it. Photometric
operations follow Pillow to within a grey level; geometric ones are composed into one matrix
and resampled once, after the photometric ones, then cutout (DeVries & Taylor, 2017).
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.semisup.config import AugmentationConfig
from weighmatch.semisup.parts.streams import Rows

# --- photometric operations: uint8-valued float images (n, C, H, W), factors (n,) ----------


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Blend: start + factor · (images − start), cut to whole levels as Pillow does."""
    mixed = (images - start).mul_(factors.view(-1, 1, 1, 1)).add_(start)
    return mixed.clamp_(0, 255).floor_()


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in Pillow's fixed-point arithmetic, (n, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor().unsqueeze(1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black; factor 1 changes nothing."""
    return (images * factors.view(-1, 1, 1, 1)).clamp_(0, 255).floor_()


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    mean = (_grey(images).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean, images, factors)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image; nothing on one channel."""
    return _blend(_grey(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with a 3×3 smoothing, 5 in the middle and 1 around; the outermost pixels stay."""
    if min(images.shape[-2:]) < 3:
        return images
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = images.clone()
    inside = smooth[..., 1:-1, 1:-1]
    inside.mul_(4).add_(box).div_(13).add_(0.5).floor_()
    return _blend(smooth, images, factors)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` highest bits."""
    step = torch.exp2(8 - bits.round()).view(-1, 1, 1, 1)
    return (images / step).floor() * step


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the pixels at or above the threshold."""
    inverted = (images >= thresholds.view(-1, 1, 1, 1)).to(images.dtype)
    # As arithmetic: `torch.where` takes twice the time on a CPU.
    return torch.addcmul(images, inverted, 255 - 2 * images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0–255; a flat channel stays."""
    low = images.amin(dim=(2, 3), keepdim=True)
    high = images.amax(dim=(2, 3), keepdim=True)
    # float64, as Pillow: its truncation would tell a last bit of float32 apart.
    scale = torch.where(high > low, 255.0 / (high - low).double(), 1.0)
    offset = torch.where(high > low, low * scale, 0.0)
    return (images * scale - offset).clamp_(0, 255).floor_().to(images.dtype)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Equalise the histogram of each channel."""
    n, channels, height, width = images.shape
    flat = images.reshape(n * channels, height * width).long()
    # In one dimension, where counting has a repeatable algorithm on a GPU.
    row = torch.arange(n * channels, device=images.device).unsqueeze(1)
    index = (flat + 256 * row).view(-1)
    counts = flat.new_zeros(n * channels * 256).scatter_add_(0, index, torch.ones_like(index))
    histogram = counts.view(n * channels, 256)
    last = flat.amax(dim=1, keepdim=True)
    step = (height * width - histogram.gather(1, last)) // 255
    below = histogram.cumsum(dim=1) - histogram
    # In floating point, exact here and vectorised, unlike the division of integers.
    levels = ((below + step // 2).float() / step.clamp(min=1)).floor_().clamp_(max=255)
    same = torch.arange(256, device=images.device, dtype=levels.dtype)
    table = torch.where(step > 0, levels, same)
    return table.gather(1, flat).view_as(images).to(images.dtype)


# --- geometric operations: matrices (n, 2, 3) from output to input pixels -------------------


def affine(images: Tensor, matrices: Tensor, fill: float, mode: str = "bilinear") -> Tensor:
    """Resample images (n, C, H, W) by matrices (n, 2, 3), with Pillow's AFFINE convention.

    A row (a, b, c), (d, e, f) takes the output pixel (x, y) from (ax+by+c, dx+ey+f), both in
    pixels from the top left corner; what lies outside is `fill`.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=images.dtype) + 0.5
    y = torch.arange(height, device=images.device, dtype=images.dtype) + 0.5
    # Straight into [-1, 1], which grid_sample counts in.
    # By numbers of the host: a tensor of them would make a GPU wait for its copy.
    across, down = matrices.unbind(1)
    scaled = torch.complex(2 * across / width, 2 * down / height)
    # Both coordinates as one complex number: they are added where they have to lie, side by side.
    along_x, along_y, offset = scaled.unsqueeze(2).unbind(1)
    columns, rows = along_x * x + (offset - complex(1, 1)), along_y * y
    grid = torch.view_as_real(columns.unsqueeze(1) + rows.unsqueeze(2))
    if fill == 0:
        return F.grid_sample(images, grid, mode=mode, align_corners=False)
    # grid_sample fills with zeros: sample the difference to the fill.
    return F.grid_sample(images - fill, grid, mode=mode, align_corners=False).add_(fill)


def _compose(first: Tensor, second: Tensor) -> Tensor:
    """The matrix that looks up through `second`, then `first`."""
    linear = first[:, :, :2] @ second[:, :, :2]
    offset = first[:, :, :2] @ second[:, :, 2:] + first[:, :, 2:]
    return torch.cat([linear, offset], dim=2)


def place(amounts: Tensor, height: int, width: int) -> Tensor:
    """Matrices (n, 2, 3) of one geometric operation an image.

    Args:
        amounts: (n, 5), zero but for at most one column: counter-clockwise rotation in degrees
            (as `PIL.Image.rotate`), horizontal shear in columns a row, vertical shear in rows a
            column, all about the middle; move by a fraction of the width (positive: the content
            goes left) and of the height (positive: up).
        height: of the images.
        width: of the images.
    """
    angle = amounts[:, 0] * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    top = torch.stack([cos, amounts[:, 1] - sin], dim=1)
    bottom = torch.stack([amounts[:, 2] + sin, cos], dim=1)
    linear = torch.stack([top, bottom], dim=1)
    size = amounts.new_tensor([width, height]).view(1, 2, 1)
    offset = size / 2 - linear @ (size / 2) + amounts[:, 3:].unsqueeze(2) * size
    return torch.cat([linear, offset], dim=2)


# --- policies -------------------------------------------------------------------------------

Photometric = Callable[[Tensor, Tensor], Tensor]

# Ranges of FixMatch's RandAugment (Sohn et al., 2020, table 12): name -> (operation, low, high);
# the geometric ones, in the order of the columns of `place`: name -> (low, high).
PHOTOMETRIC: dict[str, tuple[Photometric, float, float]] = {
    "autocontrast": (autocontrast, 0.0, 0.0),
    "brightness": (brightness, 0.05, 0.95),
    "color": (color, 0.05, 0.95),
    "contrast": (contrast, 0.05, 0.95),
    "equalize": (equalize, 0.0, 0.0),
    "posterize": (posterize, 4.0, 8.0),
    "sharpness": (sharpness, 0.05, 0.95),
    "solarize": (solarize, 0.0, 256.0),
}
GEOMETRIC: dict[str, tuple[float, float]] = {
    "rotate": (-30.0, 30.0),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}
COLUMNS = list(GEOMETRIC)


# Numbers that an image draws to be shifted and flipped.
SHIFT_DRAWS = 3

# Values that go through all operations together on the CPU: what a cache holds.
PART = 512 * 3 * 32 * 32


class Augmentation:
    """Draws weak and strong views of uint8 images (n, C, H, W) on their own device.

    All views come in torch's default precision, in [0, 1]. Randomness comes from the generator
    given (on the CPU, so that a GPU run sees the same draws), a row of numbers an image: what an
    image draws does not depend on how many are augmented together.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def plain(self, images: Tensor) -> Tensor:
        """The images as they are."""
        return images / 255

    def weak(self, images: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
        """Shift by whole pixels, reflecting at the border, and flip where that is on."""
        views = torch.empty(images.shape, device=images.device)
        uniform = _drawn(len(images), SHIFT_DRAWS, generator, rows)
        for part, shifted in self._shifted(images, uniform):
            torch.div(shifted, 255, out=views[part])
        return views

    def strong(
        self, images: Tensor, generator: torch.Generator, rows: Rows | None = None
    ) -> Tensor:
        """Weak view, then RandAugment and cutout."""
        config = self.config
        columns = [SHIFT_DRAWS, config.draws, config.draws, 2]
        uniform = _drawn(len(images), sum(columns), generator, rows)
        shifts, operations, levels, corners = uniform.split(columns, dim=1)
        parts = self._shifted(images, shifts)
        choices = (operations.T * len(config.operations)).long()
        levels, corners = levels.T.contiguous(), corners.T.contiguous()
        matrices, turned = self._placements(choices, levels, *images.shape[-2:])
        views = torch.empty(images.shape, device=images.device)
        for part, shifted in parts:
            pixels = shifted.to(views.dtype)
            self._recolour(pixels, choices[:, part], levels[:, part])
            moved = turned[part].nonzero().squeeze(1)
            if len(moved):
                chosen = moved.to(images.device, non_blocking=True)
                lookup = matrices[part][moved].to(images.device, non_blocking=True)
                placed = affine(pixels.index_select(0, chosen), lookup, config.fill)
                pixels[chosen] = placed.clamp_(0, 255)  # interpolation may round beyond
            centres = corners[:, part].to(images.device, non_blocking=True)
            cutout(pixels, centres, config.cutout, config.fill, scale=1 / 255, out=views[part])
        return views

    def _shifted(self, images: Tensor, uniform: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The weak view, uint8, part by part, from numbers in [0, 1), (n, `SHIFT_DRAWS`).

        Raises:
            ValueError: if the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images to augment must be uint8, 0 to 255, got {images.dtype}")
        n, _, height, width = images.shape
        reach_y, reach_x = (round(self.config.shift * side) for side in (height, width))
        dy = (uniform[:, 0] * (2 * reach_y + 1)).long()
        dx = (uniform[:, 1] * (2 * reach_x + 1)).long()
        # Looked up in what every shift comes to: few, where the images are many.
        rows = _reflected(height, reach_y)[dy].unsqueeze(2)
        columns = _reflected(width, reach_x)[dx].unsqueeze(1)
        if self.config.flip:
            mirrored = uniform[:, 2] < 0.5
            columns = torch.where(mirrored.view(n, 1, 1), columns.flip(2), columns)
        rows, columns = (t.to(images.device, non_blocking=True) for t in (rows, columns))
        size = max(n, 1)
        if images.device.type == "cpu" and n:
            size = max(1, PART // images[0].numel())
        parts = [slice(first, first + size) for first in range(0, n, size)]
        return ((part, _gathered(images[part], rows[part], columns[part])) for part in parts)

    def _recolour(self, pixels: Tensor, choices: Tensor, levels: Tensor) -> None:
        """The photometric operations, in place, on float images (n, C, H, W) in 0 to 255.

        Args:
            pixels: the images.
            choices: positions in `config.operations`, (draws, n), on the CPU.
            levels: where between the ends of its range each one is, (draws, n).
        """
        names = self.config.operations
        for choice, level in zip(choices, levels, strict=True):
            # Sorted by operation, so that indices and levels take one transfer each to a GPU.
            order = choice.argsort(stable=True)
            counts = choice.bincount(minlength=len(names)).tolist()
            members = order.to(pixels.device, non_blocking=True).split(counts)
            values = level[order].to(pixels.device, non_blocking=True).split(counts)
            for name, chosen, here in zip(names, members, values, strict=True):
                if name in PHOTOMETRIC and len(chosen):
                    operation, low, high = PHOTOMETRIC[name]
                    images = pixels.index_select(0, chosen)
                    pixels[chosen] = operation(images, low + (high - low) * here)

    def _placements(
        self, choices: Tensor, levels: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Matrices (n, 2, 3) that all geometric operations come to, and who has any, (n,)."""
        names = self.config.operations
        n = choices.shape[1]
        low, high = torch.tensor([GEOMETRIC.get(name, (0.0, 0.0)) for name in names]).T
        # One column more for what is not geometric.
        column = torch.tensor([COLUMNS.index(x) if x in GEOMETRIC else len(COLUMNS) for x in names])
        matrices = torch.eye(2, 3).repeat(n, 1, 1)
        for choice, level in zip(choices, levels, strict=True):
            values = (low[choice] + (high - low)[choice] * level) * self.config.magnitude
            amounts = torch.zeros(n, len(COLUMNS) + 1)
            amounts.scatter_(1, column[choice].unsqueeze(1), values.unsqueeze(1))
            matrices = _compose(matrices, place(amounts[:, :-1], height, width))
        return matrices, (column < len(COLUMNS))[choices].any(dim=0)


def _drawn(images: int, columns: int, generator: torch.Generator, rows: Rows | None) -> Tensor:
    """A row of numbers in [0, 1) an image, (images, columns), of all or of some of `rows`."""
    rows = rows or Rows(images)
    return torch.rand(rows.total, columns, generator=generator)[rows.own]


def _gathered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of images (n, C, H, W) at rows (n, H, 1) and columns (n, 1, W)."""
    n, channels, _, width = images.shape
    index = (rows * width + columns).view(n, 1, -1).expand(n, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def _reflected(side: int, reach: int) -> Tensor:
    """Where pixels come from when moved by −reach to reach, (2·reach + 1, side).

    Mirrored at 0 and side − 1, as numpy's `reflect`.
    """
    positions = torch.arange(side) + torch.arange(-reach, reach + 1).unsqueeze(1)
    period = max(2 * (side - 1), 1)
    folded = positions.remainder(period)
    return torch.where(folded < side, folded, period - folded)


def cutout(
    images: Tensor,
    centres: Tensor,
    fraction: float,
    fill: float,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Erase one square an image, centred anywhere in it, so partly outside.

    Args:
        images: (n, C, H, W).
        centres: (2, n) in [0, 1): the centre as fractions of height and width.
        fraction: side of the square as a fraction of H and of W.
        fill: what the square is set to.
        scale: what the result is multiplied by.
        out: where to put it.
    """
    height, width = images.shape[-2:]
    inside = []
    for side, centre in ((height, centres[0]), (width, centres[1])):
        extent = round(fraction * side)
        first = (centre * side).floor() - extent // 2
        offset = torch.arange(side, device=images.device) - first.unsqueeze(1)
        inside.append(((offset >= 0) & (offset < extent)).to(images.dtype))
    erased = (inside[0].unsqueeze(2) * inside[1].unsqueeze(1)).unsqueeze(1)
    # As arithmetic: a mask of booleans takes three times the time on a CPU.
    result = torch.mul(images, scale - scale * erased, out=out)
    return result if fill == 0 else result.add_(erased, alpha=scale * fill)
