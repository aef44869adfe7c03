"""Settings that serve images as they are found: their size, their colours and how many there are.

The table of these stands in docs/own_images.md.
"""

import os

from weighmatch.data.source import Recipe, Wishes
from weighmatch.extras import backbone_available

# Arms that answer whether the pool helps, against labelled images alone and plain FixMatch.
ARMS = ("supervised", "fixmatch", "learned")
# Images up to this side are like digits: the defaults of the training serve them.
TINY = 12
# Up to how many images in the pool how many steps are trained; more take the last of them.
STEPS = ((1_000, 1_000), (5_000, 1_500), (20_000, 3_000))
MOST_STEPS = 5_000
# The operations of FixMatch (Sohn et al., 2020, table 12).
COLOUR_OPERATIONS = (
    "identity",
    "autocontrast",
    "brightness",
    "color",
    "contrast",
    "equalize",
    "posterize",
    "sharpness",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
# The backbone of photographs, and the side from which images in colour count as such.
BACKBONE, WEIGHTS, PHOTOGRAPH = "efficientnet_lite0", "packaged", 32
# Views that the backbone sees in a second on one core, by the side of the images.
VIEWS_A_SECOND = {128: 105, 96: 205}
# Side, weak and strong views of an image, the most thorough first.
EXTENTS = ((128, 2, 4), (128, 1, 2), (96, 1, 2), (96, 1, 1), (96, 1, 0), (96, 0, 0))
# Seconds that features may take where no limit is set, and the share of a limit that they may.
FEATURE_SECONDS, FEATURE_SHARE = 600.0, 0.4
# Up to so many images in the pool sixteen seeds are run; runs on features are cheap.
MANY_SEEDS, POOL_OF_MANY_SEEDS = tuple(range(10, 26)), 20_000


def make_recipe(
    shape: tuple[int, int, int],
    pool: int,
    mirrored: bool | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008 (frozen)
) -> Recipe:
    """The settings for images of this shape, (C, H, W), and a pool of so many.

    Args:
        shape: channels, height and width.
        pool: the number of unlabelled images.
        mirrored: whether a mirrored image is of the same class; None: images in colour are.
        wishes: what is asked for.
    """
    channels, side, _ = shape
    augmentation: dict[str, object] = {}
    if channels == 3 if mirrored is None else mirrored:
        augmentation["flip"] = True
    if channels == 3:
        augmentation |= {"operations": list(COLOUR_OPERATIONS), "fill": 127.0}
    if channels == 3 and side >= PHOTOGRAPH and wants_backbone(wishes):
        recipe = _fine_tuned(pool) if wishes.fine_tuned else _frozen(pool, wishes.seconds)
    else:
        recipe = {"training": _from_scratch(side, pool), "runs": {"arms": list(ARMS)}}
    if augmentation:
        recipe["training"]["augmentation"] = augmentation
    return recipe


def wants_backbone(wishes: Wishes) -> bool:
    """Whether photographs get a backbone: one with weights is asked for, or no other network is."""
    network, weights = wishes.network or BACKBONE, wishes.weights or WEIGHTS
    if wishes.weights in (None, "none") and (network, weights) != (BACKBONE, WEIGHTS):
        return False
    # Wishes are not checked yet.
    are_names = isinstance(network, str) and isinstance(weights, str)
    return are_names and backbone_available(network, weights)


def _from_scratch(side: int, pool: int) -> dict[str, object]:
    steps = next((n for most, n in STEPS if pool <= most), MOST_STEPS)
    training: dict[str, object] = {"network": "small_cnn", "steps": steps}
    if side > TINY:
        # As tuned on rendered characters.
        training |= {
            "unlabelled_ratio": 2,
            "threshold": 0.8,
            "distribution_alignment": True,
            "learning_rate": 0.025,
            "influence": {
                "outer_batch": 256,
                "curvature_batch": 64,
                "batch": 256,
                "damping": 0.1,
                "max_products": 6,
            },
        }
    return training


def _fine_tuned(pool: int) -> Recipe:
    """A backbone that is trained further: settings that learn, not tuned ones."""
    training = {
        **_from_scratch(PHOTOGRAPH, pool),
        "network": BACKBONE,
        "weights": WEIGHTS,
        "learning_rate": 0.15,
    }
    return {"data": {"size": 128}, "training": training, "runs": {"arms": list(ARMS)}}


def _frozen(pool: int, seconds: float | None) -> Recipe:
    """A linear head on a frozen backbone, as tuned on CIFAR-10 with other classes unknown."""
    allowed = FEATURE_SECONDS if seconds is None else FEATURE_SHARE * seconds
    cores = os.cpu_count() or 1
    size, weak, strong = next(
        (
            extent
            for extent in EXTENTS
            if pool * (1 + sum(extent[1:])) <= allowed * cores * VIEWS_A_SECOND[extent[0]]
        ),
        EXTENTS[-1],
    )
    training: dict[str, object] = {
        "network": BACKBONE,
        "weights": WEIGHTS,
        "features": {"weak_views": weak, "strong_views": strong},
        "steps": 1000,
        "batch_size": 32,
        "unlabelled_ratio": 7,
        "threshold": 0.7,
        "distribution_alignment": True,
        "learning_rate": 1.0,
        "influence": {
            "outer_batch": 256,
            "curvature_batch": 512,
            "batch": 512,
            "damping": 0.01,
            "max_products": 50,
        },
        "ranking": {"contamination_level": 0.05},
    }
    seeds = {"seeds": list(MANY_SEEDS)} if pool <= POOL_OF_MANY_SEEDS else {}
    # The ranking does not depend on what the head learns: a second round is the last that helps.
    runs = {"arms": list(ARMS), "rounds": 2}
    return {"data": {"size": size, **seeds}, "training": training, "runs": runs}
