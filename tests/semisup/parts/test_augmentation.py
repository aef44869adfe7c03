"""Each operation against Pillow's, and what holds for whole views."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from weighmatch.semisup.config import OPERATIONS, AugmentationConfig
from weighmatch.semisup.parts import augmentation as augment
from weighmatch.semisup.parts.augmentation import GEOMETRIC, PHOTOMETRIC, Augmentation


def draw_images(channels, n=6, side=20, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (n, channels, 5, 5)).repeat(4, 2).repeat(4, 3)
    noisy = np.clip(smooth + rng.integers(-20, 21, (n, channels, side, side)), 0, 255)
    noisy[0] = 77  # a flat image
    return noisy.astype(np.uint8)


def to_pil(image):
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def from_pil(image):
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


PILLOW = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "posterize": lambda image, v: ImageOps.posterize(image, round(v)),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(PHOTOMETRIC))
def test_photometric_operations_are_pillows(name, channels):
    images = draw_images(channels)
    operation, low, high = PHOTOMETRIC[name]
    values = torch.linspace(low, high, len(images))
    if name in ("brightness", "contrast", "color", "sharpness"):
        values = torch.tensor([0.05, 0.3, 0.6, 0.95, 1.0, 1.8])
    result = operation(torch.from_numpy(images).float(), values)
    for k, image in enumerate(images):
        expected = from_pil(PILLOW[name](to_pil(image), float(values[k])))
        difference = np.abs(result[k].numpy() - expected.astype(np.float32))
        assert difference.max() <= 1, (name, k)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_geometric_operations_are_pillows_away_from_the_border(name, mode):
    images = draw_images(3)
    low, high = GEOMETRIC[name]
    # Off the values at which two pixels are equally near and rounding decides.
    values = torch.linspace(low, high, len(images)) + 0.0137
    amounts = torch.zeros(len(values), len(GEOMETRIC))
    amounts[:, list(GEOMETRIC).index(name)] = values
    matrices = augment.place(amounts, 20, 20)
    moved = augment.affine(torch.from_numpy(images).float(), matrices, fill=0.0, mode=mode)
    resample = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}[mode]
    for k, image in enumerate(images):
        coefficients = matrices[k].flatten().tolist()
        expected = to_pil(image).transform((20, 20), Image.Transform.AFFINE, coefficients, resample)
        inside = to_pil(np.full_like(image, 255)).transform(
            (20, 20), Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST
        )
        # Pillow clamps where the source pixel touches the border: compare what lies inside.
        keep = _eroded(from_pil(inside)[0] == 255)
        difference = np.abs(moved[k].numpy() - from_pil(expected).astype(np.float32))[:, keep]
        assert keep.sum() > 60
        assert (difference <= 1.01).mean() > 0.995, (name, k, difference.max())


PILLOWS_MATRICES = {
    "shear_x": lambda v, side: (1, v, -v * side / 2, 0, 1, 0),
    "shear_y": lambda v, side: (1, 0, 0, v, 1, -v * side / 2),
    "translate_x": lambda v, side: (1, 0, v * side, 0, 1, 0),
    "translate_y": lambda v, side: (1, 0, 0, 0, 1, v * side),
}


@pytest.mark.parametrize("name", sorted(PILLOWS_MATRICES))
def test_shears_and_moves_go_where_pillows_matrix_takes_them(name):
    for value in (-0.25, 0.1, 0.3):
        amounts = torch.zeros(1, len(GEOMETRIC))
        amounts[0, list(GEOMETRIC).index(name)] = value
        found = augment.place(amounts, 20, 20).flatten()
        expected = torch.tensor(PILLOWS_MATRICES[name](value, 20), dtype=torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("degrees", [-30.0, -7.0, 12.0, 30.0])
def test_rotations_are_pillows(degrees):
    images = draw_images(3)
    amounts = torch.zeros(len(images), len(GEOMETRIC))
    amounts[:, list(GEOMETRIC).index("rotate")] = degrees
    turned = augment.affine(torch.from_numpy(images).float(), augment.place(amounts, 20, 20), 0.0)
    for k, image in enumerate(images):
        expected = from_pil(to_pil(image).rotate(degrees, Image.Resampling.BILINEAR))
        inside = from_pil(to_pil(np.full_like(image, 255)).rotate(degrees))[0] == 255
        difference = np.abs(turned[k].numpy() - expected.astype(np.float32))[:, _eroded(inside)]
        assert (difference <= 1.01).mean() > 0.995, (k, difference.max())


def test_cutout_is_pillows_rectangle():
    image = draw_images(3, n=2, seed=4)[1]
    for y, x in ((0.5, 0.5), (0.0, 0.95), (0.8, 0.1)):
        cut = augment.cutout(
            torch.from_numpy(image[None]).float(), torch.tensor([[y], [x]]), fraction=0.5, fill=0.0
        )
        expected = to_pil(image)
        top, left = int(y * 20) - 5, int(x * 20) - 5
        ImageDraw.Draw(expected).rectangle((left, top, left + 9, top + 9), fill=(0, 0, 0))
        assert np.array_equal(cut[0].numpy(), from_pil(expected))


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_images_that_are_not_uint8_are_refused(view):
    floats = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"must be uint8, 0 to 255, got torch\.float32"):
        getattr(Augmentation(AugmentationConfig()), view)(floats, torch.Generator())


def _eroded(mask):
    padded = np.pad(mask, 1)
    shifted = [np.roll(padded, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.logical_and.reduce(shifted)[1:-1, 1:-1]


def test_rotation_turns_the_way_pillow_does():
    image = draw_images(1, n=1, seed=3)
    image[:] = 0
    image[0, 0, 4:8, 12:16] = 255
    rotated = augment.affine(
        torch.from_numpy(image).float(),
        augment.place(torch.tensor([[30.0, 0.0, 0.0, 0.0, 0.0]]), 20, 20),
        fill=0.0,
        mode="nearest",
    )
    expected = from_pil(to_pil(image[0]).rotate(30, Image.Resampling.NEAREST))
    assert (np.abs(rotated[0].numpy() - expected) > 1).mean() < 0.02


def test_every_operation_of_the_configuration_exists():
    assert set(OPERATIONS) == {"identity", *PHOTOMETRIC, *GEOMETRIC}


def test_weak_view_shifts_by_whole_pixels_and_reflects():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    weak = Augmentation(AugmentationConfig(shift=0.125)).weak(image, torch.Generator())
    padded = np.pad(image[0, 0].numpy(), 1, mode="reflect")
    allowed = {padded[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    seen = {(view[0] * 255).round().to(torch.uint8).numpy().tobytes() for view in weak}
    assert seen == allowed


def test_flip_mirrors_about_half():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(400, 1, 1, 1)
    config = AugmentationConfig(shift=0.0, flip=True)
    weak = (Augmentation(config).weak(image, torch.Generator().manual_seed(0)) * 255).round()
    mirrored = (weak[:, 0, 0, 0] == 7).float()
    assert (weak[mirrored == 1] == image[0].flip(2).float()).all()
    assert (weak[mirrored == 0] == image[0].float()).all()
    assert 0.4 < float(mirrored.mean()) < 0.6


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_views_differ_per_image_stay_in_range_and_repeat(channels):
    images = torch.from_numpy(draw_images(channels, n=1, seed=1)).repeat(64, 1, 1, 1)
    images[:, :, 5:15, 5:15] = 200
    before = images.clone()
    augmentation = Augmentation(AugmentationConfig())
    strong = augmentation.strong(images, torch.Generator().manual_seed(0))
    assert strong.dtype == torch.float32
    assert strong.shape == images.shape
    assert 0 <= float(strong.min()) <= float(strong.max()) <= 1
    assert len({view.numpy().tobytes() for view in strong}) > 50
    assert torch.equal(images, before)
    again = augmentation.strong(images, torch.Generator().manual_seed(0))
    assert torch.equal(strong, again)


def test_cutout_erases_the_square_it_should():
    images = torch.full((2, 3, 8, 8), 100.0)
    centres = torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    cut = augment.cutout(images, centres, fraction=0.5, fill=7.0)
    assert (cut[0, :, 2:6, 2:6] == 7).all()
    assert (cut[0] == 7).sum() == 3 * 16
    assert (cut[1] == 7).sum() == 3 * 4  # the corner: a quarter of the square is inside


def test_no_operation_and_no_cutout_is_the_weak_view():
    images = torch.from_numpy(draw_images(3))
    config = AugmentationConfig(operations=("identity",), cutout=0.0)
    augmentation = Augmentation(config)
    # One at a time: an image's first draws are those of the shift.
    for image in images.split(1):
        weak = augmentation.weak(image, torch.Generator().manual_seed(5))
        strong = augmentation.strong(image, torch.Generator().manual_seed(5))
        torch.testing.assert_close(strong, weak, atol=1e-5, rtol=0)


def test_views_do_not_depend_on_how_many_are_drawn_together():
    images = torch.from_numpy(draw_images(3)).repeat(3, 1, 1, 1)
    augmentation = Augmentation(AugmentationConfig(flip=True))
    for draw in (augmentation.weak, augmentation.strong):
        together = draw(images, torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        parts = [draw(part, generator) for part in images.split(4)]
        assert torch.equal(together, torch.cat(parts))
