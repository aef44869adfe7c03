"""Weak and strong augmentation of a batch, another draw for every image.

torchvision's transforms draw one operation for a whole batch; FixMatch (Sohn et al., 2020)
needs RandAugment (Cubuk et al., 2020) image by image. Here every image has its own operations
and magnitudes, and each operation runs once, on all the images that drew it. Photometric
operations follow Pillow to within a grey level; geometric ones are composed into one matrix
and resampled once, after the photometric ones, then cutout (DeVries & Taylor, 2017).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.semisup.config import AugmentationConfig

# --- photometric operations: uint8-valued float images (n, C, H, W), factors (n,) ----------


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Blend: start + factor · (images − start), cut to whole levels as Pillow does."""
    mixed = start + factors.view(-1, 1, 1, 1) * (images - start)
    return mixed.clamp(0, 255).floor()


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in Pillow's fixed-point arithmetic, (n, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor().unsqueeze(1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black; factor 1 changes nothing."""
    return _blend(torch.zeros_like(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    mean = (_grey(images).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean.expand_as(images), images, factors)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image; nothing on one channel."""
    return _blend(_grey(images).expand_as(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with a 3×3 smoothing; the outermost pixels stay."""
    if min(images.shape[-2:]) < 3:
        return images
    channels = images.shape[1]
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (
        F.conv2d(images, kernel.expand(channels, 1, 3, 3), groups=channels) + 0.5
    ).floor()
    return _blend(smooth, images, factors)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` highest bits."""
    step = torch.exp2(8 - bits.round()).view(-1, 1, 1, 1)
    return (images / step).floor() * step


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the pixels at or above the threshold."""
    return torch.where(images < thresholds.view(-1, 1, 1, 1), images, 255 - images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0–255; a flat channel stays."""
    low = images.amin(dim=(2, 3), keepdim=True)
    high = images.amax(dim=(2, 3), keepdim=True)
    # float64, as Pillow: its truncation would tell a last bit of float32 apart.
    scale = 255.0 / (high - low).clamp(min=1).double()
    stretched = (images.double() * scale - low * scale).clamp(0, 255).floor().to(images.dtype)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Equalise the histogram of each channel."""
    n, channels, height, width = images.shape
    flat = images.reshape(n * channels, height * width).long()
    ones = torch.ones_like(flat)
    histogram = flat.new_zeros(n * channels, 256).scatter_add_(1, flat, ones)
    last = flat.amax(dim=1, keepdim=True)
    step = (height * width - histogram.gather(1, last)) // 255
    below = histogram.cumsum(dim=1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = torch.where(step > 0, table.gather(1, flat), flat)
    return equalized.view_as(images).to(images.dtype)


# --- geometric operations: matrices (n, 2, 3) from output to input pixels -------------------


def affine(images: Tensor, matrices: Tensor, fill: float, mode: str = "bilinear") -> Tensor:
    """Resample images (n, C, H, W) by matrices (n, 2, 3), with Pillow's AFFINE convention.

    A row (a, b, c), (d, e, f) takes the output pixel (x, y) from (ax+by+c, dx+ey+f), both in
    pixels from the top left corner; what lies outside is `fill`.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=images.dtype) + 0.5
    y = torch.arange(height, device=images.device, dtype=images.dtype) + 0.5
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([columns.flatten(), rows.flatten(), torch.ones_like(rows.flatten())])
    source = (matrices @ points).view(-1, 2, height, width)
    size = source.new_tensor([width, height]).view(1, 2, 1, 1)
    grid = (2 * source / size - 1).permute(0, 2, 3, 1)
    # grid_sample fills with zeros: sample the difference to the fill.
    moved = F.grid_sample(images - fill, grid, mode=mode, align_corners=False)
    return moved + fill


def _compose(first: Tensor, second: Tensor) -> Tensor:
    """The matrix that looks up through `second`, then `first`."""
    linear = first[:, :, :2] @ second[:, :, :2]
    offset = first[:, :, :2] @ second[:, :, 2:] + first[:, :, 2:]
    return torch.cat([linear, offset], dim=2)


def _centred(linear: Tensor, height: int, width: int) -> Tensor:
    """Matrices (n, 2, 3) that apply `linear` (n, 2, 2) about the middle of the image."""
    centre = linear.new_tensor([width / 2, height / 2]).view(1, 2, 1)
    return torch.cat([linear, centre - linear @ centre], dim=2)


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(2, 3, device=like.device, dtype=like.dtype).repeat(n, 1, 1)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Counter-clockwise rotation about the middle, as `PIL.Image.rotate`."""
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return _centred(linear, height, width)


def shear_x(amounts: Tensor, height: int, width: int) -> Tensor:
    """Horizontal shear about the middle, in columns per row."""
    linear = torch.eye(2, device=amounts.device, dtype=amounts.dtype).repeat(len(amounts), 1, 1)
    linear[:, 0, 1] = amounts
    return _centred(linear, height, width)


def shear_y(amounts: Tensor, height: int, width: int) -> Tensor:
    """Vertical shear about the middle, in rows per column."""
    linear = torch.eye(2, device=amounts.device, dtype=amounts.dtype).repeat(len(amounts), 1, 1)
    linear[:, 1, 0] = amounts
    return _centred(linear, height, width)


def translate_x(fractions: Tensor, height: int, width: int) -> Tensor:
    """Horizontal move by a fraction of the width; positive moves the content left."""
    matrices = _identity(len(fractions), fractions)
    matrices[:, 0, 2] = fractions * width
    return matrices


def translate_y(fractions: Tensor, height: int, width: int) -> Tensor:
    """Vertical move by a fraction of the height; positive moves the content up."""
    matrices = _identity(len(fractions), fractions)
    matrices[:, 1, 2] = fractions * height
    return matrices


# --- policies -------------------------------------------------------------------------------

Photometric = Callable[[Tensor, Tensor], Tensor]
Geometric = Callable[[Tensor, int, int], Tensor]

# Ranges of FixMatch's RandAugment (Sohn et al., 2020, table 12): name -> (operation, low, high).
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
GEOMETRIC: dict[str, tuple[Geometric, float, float]] = {
    "rotate": (rotation, -30.0, 30.0),
    "shear_x": (shear_x, -0.3, 0.3),
    "shear_y": (shear_y, -0.3, 0.3),
    "translate_x": (translate_x, -0.3, 0.3),
    "translate_y": (translate_y, -0.3, 0.3),
}


class Augmentation:
    """Draws weak and strong views of uint8 images (n, C, H, W) on their own device.

    Both views come as float32 in [0, 1]. Randomness comes from the generator given (on the
    CPU, so that a GPU run sees the same draws).
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def weak(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift by whole pixels, reflecting at the border, and flip where that is on."""
        n, channels, height, width = images.shape
        reach_y, reach_x = (round(self.config.shift * side) for side in (height, width))
        dy = torch.randint(-reach_y, reach_y + 1, (n, 1, 1, 1), generator=generator)
        dx = torch.randint(-reach_x, reach_x + 1, (n, 1, 1, 1), generator=generator)
        rows = _reflect(torch.arange(height).view(1, 1, -1, 1) + dy, height)
        columns = _reflect(torch.arange(width).view(1, 1, 1, -1) + dx, width)
        if self.config.flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(3), columns)
        index = (rows * width + columns).flatten(1).to(images.device, non_blocking=True)
        index = index.unsqueeze(1).expand(n, channels, height * width)
        return images.flatten(2).gather(2, index).view_as(images).float() / 255

    def strong(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Weak view, then RandAugment and cutout."""
        config = self.config
        n, _, height, width = images.shape
        pixels = (self.weak(images, generator) * 255).round()
        choices = torch.randint(len(config.operations), (config.draws, n), generator=generator)
        levels = torch.rand(config.draws, n, generator=generator)
        corners = torch.rand(2, n, generator=generator)

        matrices = _identity(n, pixels)
        for choice, level in zip(choices, levels, strict=True):
            for position, name in enumerate(config.operations):
                chosen = (choice == position).nonzero().squeeze(1)
                if name == "identity" or len(chosen) == 0:
                    continue
                level_here = level[chosen].to(pixels.device, non_blocking=True)
                chosen = chosen.to(pixels.device, non_blocking=True)
                if name in PHOTOMETRIC:
                    operation, low, high = PHOTOMETRIC[name]
                    values = low + (high - low) * level_here
                    pixels[chosen] = operation(pixels[chosen], values)
                else:
                    place, low, high = GEOMETRIC[name]
                    values = (low + (high - low) * level_here) * config.magnitude
                    matrices[chosen] = _compose(matrices[chosen], place(values, height, width))
        pixels = affine(pixels, matrices, config.fill)
        if config.cutout > 0:
            pixels = cutout(pixels, corners.to(pixels.device), config.cutout, config.fill)
        return pixels / 255


def _reflect(positions: Tensor, side: int) -> Tensor:
    """Whole positions mirrored at 0 and side − 1, as numpy's `reflect`."""
    period = max(2 * (side - 1), 1)
    folded = positions.remainder(period)
    return torch.where(folded < side, folded, period - folded)


def cutout(images: Tensor, centres: Tensor, fraction: float, fill: float) -> Tensor:
    """Erase one square an image, centred anywhere in it, so partly outside.

    Args:
        images: (n, C, H, W).
        centres: (2, n) in [0, 1): the centre as fractions of height and width.
        fraction: side of the square as a fraction of H and of W.
        fill: what the square is set to.
    """
    height, width = images.shape[-2:]
    inside = []
    for side, centre in ((height, centres[0]), (width, centres[1])):
        extent = round(fraction * side)
        first = (centre * side).floor() - extent // 2
        offset = torch.arange(side, device=images.device) - first.unsqueeze(1)
        inside.append((offset >= 0) & (offset < extent))
    keep = ~(inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)
    return torch.where(keep, images, images.new_tensor(fill))
