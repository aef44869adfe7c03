"""A stored run, a folder of images, and what tests of rankings share."""

import numpy as np
from PIL import Image

from weighmatch.data.rank_config import Preparation
from weighmatch.semisup import make_schedule
from weighmatch.shards import Shards, score_shard

FILES = ("ranking.csv", "ranking.parquet", "gallery.html", "rejected_files.csv")


def train_run(training_set, run_config, tmp_path):
    config = run_config(steps=40, schedule="rounds", rounds=2)
    return make_schedule(config).fit(training_set, tmp_path / "run")


def draw_folder(tmp_path):
    """30 images in two folders, and files that are none."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for k in range(30):
        place = root / f"{k % 2}" / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place)
    (root / "notes.txt").write_text("no image")
    (root / "1" / "empty.png").touch()
    (root / ".DS_Store").write_bytes(b"\0")
    return root


def score_all(place, run, root, preparation=Preparation(), limit=None):  # noqa: B008 (frozen)
    """Score what is missing, up to a limit; the numbers of the shards that were scored."""
    found = Shards(place, run, root, preparation)
    numbers = found.missing()[:limit]
    for number in numbers:
        found.add(score_shard(place, number, lambda files: None))
    return numbers


def manifest_in(place):
    """The only manifest of a working folder."""
    (path,) = place.glob("*-manifest.jsonl")
    return path


def same_ranking(first, second):
    """Whether two folders have the same files, those of the shards among them."""
    both = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (first, second)
    ]
    return both[0] == both[1] and both[0].keys() > {*FILES}
