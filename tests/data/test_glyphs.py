import numpy as np
import pytest

from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import load_photographs
from weighmatch.data.source import get_source
from weighmatch.data.sources import glyphs
from weighmatch.data.sources.glyphs import CHARACTERS, FONTS, SHIFTS, GlyphConfig, render


@pytest.fixture(scope="module")
def photographs():
    return load_photographs()


def config(**changes):
    small = {"pool_size": 80, "heldout_size": 24, "test_size": 36, "labels_per_class": 2}
    mixed = {"ood_source": "unseen+patches"}
    return DataConfig(seeds=[0], source="glyphs", **{**small, **mixed, **changes})


def split(photographs, seed, **changes):
    return get_source("glyphs").draw({"photographs": photographs}, config(**changes), seed)


def drawn(photographs, characters, split="train", shifted=None, **changes):
    n = len(characters)
    shifted = np.zeros(n, bool) if shifted is None else shifted
    rng = np.random.default_rng(0)
    return render(np.array(characters), split, shifted, GlyphConfig(**changes), photographs, rng)


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3)])
def test_images_have_the_size_and_colours_that_were_asked_for(photographs, size, channels):
    images = drawn(photographs, [0] * 20, size=size, channels=channels)
    assert images.shape == (20, channels, size, size)
    assert images.dtype == np.uint8
    if channels == 3:
        assert (images[:, 0] != images[:, 1]).mean() > 0.5


def test_the_middle_shows_the_character(photographs):
    """Without clutter and noise, the mean image of a character is its own and no other's."""
    plain = {"clutter": 0, "noise": 0.0}
    first, second = (
        drawn(photographs, [CHARACTERS.index(c)] * 150, **plain)[:, 0].astype(float) for c in "TL"
    )
    assert first[:, 3:6].mean() > second[:, 3:6].mean() + 10  # the bar of a T is on top
    assert second[:, 10:13].mean() > first[:, 10:13].mean() + 10  # that of an L at the bottom


def test_fonts_of_the_splits_have_nothing_in_common():
    names = [name for split in FONTS.values() for name in split]
    assert len(set(names)) == len(names) == 22


@pytest.mark.parametrize("shift", SHIFTS[1:])
def test_only_shifted_images_are_shifted(photographs, shift):
    half = np.arange(400) % 2 == 1
    images = drawn(photographs, [2] * 400, shifted=half, shift=shift).astype(float)
    same = drawn(photographs, [2] * 400, shifted=np.zeros(400, bool), shift=shift).astype(float)
    if shift == "inverted":
        np.testing.assert_array_equal(images[~half], same[~half])
        assert images[half].mean() > images[~half].mean() + 50
    else:
        assert np.abs(images[half] - same[half]).mean() > 5


@pytest.mark.parametrize("split", FONTS)
def test_where_fonts_shift_shifted_characters_are_slanted_and_others_upright(
    photographs, split, monkeypatch
):
    fonts = []
    sheet = glyphs._sheet
    monkeypatch.setattr(glyphs, "_sheet", lambda font, c: fonts.append(font) or sheet(font, c))
    half = np.arange(60) % 2 == 1
    drawn(photographs, [2] * 60, split, half, shift="fonts", clutter=0)
    slanted = {"DejaVuSans-Oblique", "STIXGeneralItalic", "DejaVuSerif-Italic", "cmti10"}
    slanted |= {"DejaVuSans-BoldOblique", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"}
    slanted |= {"DejaVuSerif-BoldItalic", "STIXGeneralBolIta", "cmmi10"}
    assert [font in slanted for font in fonts] == half.tolist()


def test_many_images_are_drawn_a_part_at_a_time(photographs, monkeypatch):
    monkeypatch.setattr(glyphs, "IMAGES_AT_ONCE", 50)
    first = drawn(photographs, [0] * 50)
    images = drawn(photographs, [0] * 120)
    assert images.shape == (120, 1, 16, 16)
    np.testing.assert_array_equal(images[:50], first)
    assert (images[50:100] != first).any()


def test_splits_are_seeded_and_share_what_they_must(photographs):
    first = split(photographs, 3)
    again = split(photographs, 3)
    np.testing.assert_array_equal(first.pool.images, again.pool.images)
    other = split(photographs, 3, ratio=0.25, ood_source="unseen", regime="added")
    np.testing.assert_array_equal(first.test_images, other.test_images)
    np.testing.assert_array_equal(first.labelled_images, other.labelled_images)
    assert (split(photographs, 4).test_images != first.test_images).any()


def test_each_split_shows_its_own_fonts_and_no_labelled_image_is_shifted(photographs, monkeypatch):
    calls = []

    def record(characters, fonts, shifted, *rest):
        calls.append((len(characters), fonts, shifted.any()))
        return render(characters, fonts, shifted, *rest)

    monkeypatch.setattr(glyphs, "render", record)
    split(photographs, 0, shifted=0.5, glyphs={"shift": "inverted"})
    labelled, (test, *unlabelled) = calls[:6], calls[6:]
    assert labelled == [(2, "train", False)] * 6
    assert test == (36, "test", True)
    assert unlabelled == [
        (20, "train", True),
        (30, "train", True),
        (24, "validation", True),
        (12, "validation", True),
    ]


def test_the_pool_is_contaminated_as_asked(photographs):
    splits = split(photographs, 0, shifted=0.5, glyphs={"shift": "fonts"})
    assert np.bincount(splits.pool.kinds).tolist() == [20, 30, 30]
    assert ((splits.pool.classes >= 0) == (splits.pool.kinds == 0)).all()
    assert np.ptp(np.bincount(splits.test_labels)) == 0
    assert 0.2 < splits.test_shifted.mean() < 0.8
    assert not splits.pool.shifted[splits.pool.kinds == 2].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"glyphs": {"seen": "Ab"}}, "data.glyphs.seen"),
        ({"glyphs": {"seen": "A"}}, "two characters"),
        ({"glyphs": {"seen": "ABG"}}, "data.glyphs.unseen has G"),
        ({"glyphs": {"size": 4}}, "data.glyphs.size"),
        ({"glyphs": {"size": 129}}, "data.glyphs.size must be at most 128"),
        ({"glyphs": {"channels": 2}}, "data.glyphs.channels"),
        ({"glyphs": {"shift": "moon"}}, "data.glyphs.shift"),
        ({"glyphs": {"fonts": 3}}, "data.glyphs has no parameter fonts"),
        ({"shifted": 0.5}, "a share above 0 needs glyphs and a shift"),
        ({"glyphs": {"shift": "fonts"}}, "a shift needs a share"),
        ({"ood_source": "unseen+unseen"}, "data.ood_source"),
    ],
)
def test_wrong_parameters_are_named_with_the_cure(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
