"""Settings that serve images as they are found: their size, their colours and how many there are.

The table of these stands in docs/own_images.md.
"""

from weighmatch.data.source import Recipe

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


def make_recipe(shape: tuple[int, int, int], pool: int, mirrored: bool | None = None) -> Recipe:
    """The settings for images of this shape, (C, H, W), and a pool of so many.

    Args:
        shape: channels, height and width.
        pool: the number of unlabelled images.
        mirrored: whether a mirrored image is of the same class; None: images in colour are.
    """
    channels, side, _ = shape
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
    augmentation: dict[str, object] = {}
    if channels == 3 if mirrored is None else mirrored:
        augmentation["flip"] = True
    if channels == 3:
        augmentation |= {"operations": list(COLOUR_OPERATIONS), "fill": 127.0}
    if augmentation:
        training["augmentation"] = augmentation
    return {"training": training, "runs": {"arms": list(ARMS)}}
