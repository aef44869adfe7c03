"""A whole job on a folder of own images: made, run and judged, in one command.

    uv run python -m benchmarks.own_images generated DIR [--files 100000] [--labels 100] [--mixed]
    uv run python -m benchmarks.own_images cifar10 DIR --source CIFAR [--labels 120] [--pool 3000]
    uv run python -m benchmarks.own_images judge DIR --data DATA [--params training.steps=500]

`generated` draws JPEG files of 200 to 500 pixels. Five shapes are the classes; half of the pile
shows other things. With `--mixed` the files are such as people have: their long sides have 120 to
4,000 pixels, upright or not. Some are turned by EXIF, grey or transparent, some are PNG or WebP.
One in ten is there once more, compressed anew, smaller or cropped. `cifar10` copies files of
CIFAR-10 (`CIFAR/train/<class>/`, `CIFAR/test/…`): six animals are the classes, and half of the pile
are vehicles. Both put bad files and a copy among them and write the truth beside the folder, to
`DIR.truth.csv`. The same seed gives the same folder.
`judge` runs the whole job with its files in DATA and prints what it took and found, as a table.
"""

import argparse
import csv
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score

from benchmarks.tables import conditions, markdown, show
from weighmatch.workers import run_all

ROOT = Path(__file__).parents[1]
CHUNK = 500
SMALLEST, LARGEST = 200, 500
# Of mixed files: sides in pixels, short sides as shares of long ones, EXIF's orientations with the
# degrees by which the stored image is turned, and the share of images that are there once more.
MIXED_SIDES, ASPECTS, ORIENTATIONS = (
    (120, 4000),
    (9 / 16, 2 / 3, 3 / 4, 1.0),
    {3: 180, 6: 90, 8: 270},
)
REPEATED = 0.1
AGAIN = ("compressed anew", "smaller", "cropped")
SEEN = ("cross", "disc", "ring", "square", "triangle")
FOREIGN = ("star", "stripes", "letter-like", "blob", "nothing")
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")
Rows = list[tuple[str, str]]
Point = tuple[float, float]


# --- images that are drawn -------------------------------------------------------------------


def polygon(
    corners: int, centre: Point, radius: float, turn: float, inner: float = 1.0
) -> list[Point]:
    """The corners of a regular polygon, or of a star where every other one is nearer."""
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    radii = [radius * (inner if k % 2 else 1.0) for k in range(corners)]
    return [
        (centre[0] + r * math.cos(a), centre[1] + r * math.sin(a))
        for r, a in zip(radii, angles, strict=True)
    ]


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth, coarse or striped texture in two colours."""
    coarse = int(rng.choice([2, 4, 16]))
    pixels = rng.integers(0, 150, (coarse, int(rng.choice([1, coarse])), 3), dtype=np.uint8)
    how = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((width, height), how)


def picture(kind: str, rng: np.random.Generator, mixed: bool = False) -> Image.Image:
    """An image of one kind, of `SEEN` or `FOREIGN`: colours, size, place and turn are random."""
    width, height = (int(side) for side in rng.integers(SMALLEST, LARGEST + 1, 2))
    if mixed:
        long = math.exp(rng.uniform(*np.log(MIXED_SIDES)))
        sides = (round(long), round(long * rng.choice(ASPECTS)))
        width, height = sides if rng.random() < 0.5 else sides[::-1]
    image = background(rng, width, height)
    draw = ImageDraw.Draw(image)
    radius = min(width, height) * rng.uniform(0.2, 0.4)
    centre = (
        width / 2 + rng.uniform(-0.15, 0.15) * width,
        height / 2 + rng.uniform(-0.1, 0.1) * height,
    )
    colour = tuple(int(level) for level in rng.integers(150, 256, 3))
    turn = rng.uniform(0, 2 * math.pi)
    box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    if kind == "disc":
        draw.ellipse(box, fill=colour)
    elif kind == "ring":
        draw.ellipse(box, outline=colour, width=max(int(radius / 4), 3))
    elif kind in ("square", "triangle"):
        draw.polygon(polygon(4 if kind == "square" else 3, centre, radius, turn), fill=colour)
    elif kind == "star":
        draw.polygon(polygon(10, centre, radius, turn, 0.4), fill=colour)
    elif kind == "cross":
        for quarter in (0.0, math.pi / 2):
            ends = polygon(2, centre, radius, turn + quarter)
            draw.line(ends, fill=colour, width=int(radius / 2))
    elif kind == "letter-like":
        ends = [tuple(rng.uniform(0, 1, 2) * (width, height)) for _ in range(6)]
        draw.line(ends, fill=colour, width=int(radius / 5), joint="curve")
    elif kind == "stripes":
        for k in range(0, width, 30):
            draw.line([(k, 0), (k + radius, height)], fill=colour, width=8)
    elif kind == "blob":
        for _ in range(12):
            x, y = rng.uniform(0, 1, 2) * (width, height)
            draw.ellipse([x, y, x + radius / 2, y + radius / 3], fill=colour)
    return image


def inside(image: Image.Image, margin: float) -> tuple[int, int, int, int]:
    """What a margin, as a share of both sides, leaves of an image: left, top, right, bottom."""
    left, top = round(margin * image.width), round(margin * image.height)
    return left, top, image.width - left, image.height - top


def dress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image in colour, in grey or with a transparent border."""
    mode = rng.choice(["RGB", "L", "RGBA"], p=[0.8, 0.1, 0.1])
    image = image.convert(str(mode))
    if mode == "RGBA":
        alpha = Image.new("L", image.size, 0)
        alpha.paste(255, inside(image, 0.05))
        image.putalpha(alpha)
    return image


def save_mixed(image: Image.Image, place: Path, rng: np.random.Generator) -> Path:
    """Save an image as JPEG, PNG or WebP, a third of them turned as EXIF says; returns the path."""
    kinds = (".png", ".webp") if image.mode == "RGBA" else (".jpg", ".jpg", ".jpg", ".png", ".webp")
    exif = Image.Exif()
    if rng.random() < 1 / 3:
        orientation = int(rng.choice(list(ORIENTATIONS)))
        image = image.rotate(ORIENTATIONS[orientation], expand=True)
        exif[0x0112] = orientation
    path = place.with_suffix(str(rng.choice(kinds)))
    image.save(path, quality=int(rng.integers(60, 95)), exif=exif)
    return path


def save_again(image: Image.Image, place: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """Save a near copy of an image; returns its path and one of `AGAIN`."""
    how = str(rng.choice(AGAIN))
    if how == "smaller":
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)))
    if how == "cropped":
        image = image.crop(inside(image, 0.02))
    path = place.with_suffix(".webp" if image.mode == "RGBA" else ".jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=40 if how == "compressed anew" else 85)
    return path, how


def draw_files(
    root: Path,
    first: int,
    kinds: Sequence[str],
    folders: Sequence[str],
    seed: int,
    mixed: bool,
    progress: Callable[[int], None],
) -> Rows:
    """Draw files and write them; returns the path and kind of each.

    Args:
        root: the folder of own images.
        first: the number of the first file.
        kinds: what each file shows.
        folders: where each lies in the folder.
        seed: with the number of the first file it gives the random numbers.
        mixed: whether they are files such as people have.
        progress: told of each file.
    """
    rng = np.random.default_rng([seed, first])
    rows = []
    for number, (kind, folder) in enumerate(zip(kinds, folders, strict=True), first):
        path = root / folder / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = picture(kind, rng, mixed)
        if mixed:
            image = dress(image, rng)
            path = save_mixed(image, path, rng)
            if folder.startswith("unlabelled/") and rng.random() < REPEATED:
                again, how = save_again(image, root / "unlabelled" / "again" / path.name, rng)
                rows.append((again.relative_to(root).as_posix(), how))
        else:
            image.save(path, quality=int(rng.integers(60, 95)))
        rows.append((path.relative_to(root).as_posix(), kind))
        progress(1)
    return rows


def generate(
    root: Path, files: int, labels: int, test: int, seed: int = 0, mixed: bool = False
) -> Rows:
    """Write a folder of drawn images, `files` of them in the pile; returns its truth."""
    rng = np.random.default_rng(seed)
    shown = [
        (SEEN if seen else FOREIGN)[k]
        for seen, k in zip(rng.random(files) < 0.5, rng.integers(0, 5, files), strict=True)
    ]
    kinds = [SEEN[k % len(SEEN)] for k in range(labels + test)] + shown
    folders = [f"labelled/{kind}" for kind in kinds[:labels]]
    folders += [f"test/{kind}" for kind in kinds[labels : labels + test]]
    folders += [f"unlabelled/{k // 1000:03d}" for k in range(files)]
    jobs = [
        (root, k, kinds[k : k + CHUNK], folders[k : k + CHUNK], seed, mixed)
        for k in range(0, len(kinds), CHUNK)
    ]
    made = dict(run_all(draw_files, jobs, title="drawing", total=len(kinds)))
    rows = [row for k in range(len(jobs)) for row in made[k] if row[0].startswith("unlabelled/")]
    named = {**dict.fromkeys(SEEN, "useful"), **dict.fromkeys(FOREIGN, "foreign")}
    return [(path, named.get(kind, kind)) for path, kind in rows] + spoil(root)


# --- images that are copied ------------------------------------------------------------------


def lay_out(root: Path, source: Path, labels: int, pool: int, test: int, seed: int = 0) -> Rows:
    """Copy files of CIFAR-10: `labels` of animals, a pile half of vehicles, `test` of animals."""
    rng = np.random.default_rng(seed)
    rows: Rows = []

    def copy(paths: Sequence[Path], folder: str) -> list[str]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        copied = [f"{folder}/{path.parent.name}-{path.name}" for path in paths]
        for path, place in zip(paths, copied, strict=True):
            shutil.copyfile(path, root / place)
        return copied

    pile: list[tuple[Path, str]] = []
    for names, kind in ((ANIMALS, "useful"), (VEHICLES, "foreign")):
        for position, name in enumerate(names):
            found = sorted((source / "train" / name).iterdir())
            order = rng.permutation(len(found))
            used = 0
            if kind == "useful":
                used = share(labels, len(names), position)
                copy([found[k] for k in order[:used]], f"labelled/{name}")
                tested = sorted((source / "test" / name).iterdir())
                count = share(test, len(names), position)
                if count:
                    copy([tested[k] for k in rng.permutation(len(tested))[:count]], f"test/{name}")
            wanted = share(share(pool, 2, int(kind == "foreign")), len(names), position)
            pile += [(found[k], kind) for k in order[used : used + wanted]]
    # The name of a file must not tell its class.
    for number, k in enumerate(rng.permutation(len(pile)).tolist()):
        path, kind = pile[k]
        place = f"unlabelled/{number // 1000:03d}/{number:06d}.jpg"
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / place)
        rows.append((place, kind))
    return rows + spoil(root)


def share(total: int, parts: int, position: int) -> int:
    """The size of one of several parts that are as equal as can be."""
    return total // parts + (position < total % parts)


def spoil(root: Path) -> Rows:
    """Put bad files and a copy into the pile; returns them."""
    pile = root / "unlabelled"
    first = next(path for path in sorted(pile.rglob("*.jpg")))
    content = first.read_bytes()
    bad = {
        "truncated.jpg": content[: len(content) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no image\n" * 20,
        "rubbish.png": np.random.default_rng(1).bytes(5000),
        "notes.txt": b"to do: label more\n",
        ".DS_Store": b"\0\0\0\1Bud1",
    }
    for name, written in bad.items():
        (pile / name).write_bytes(written)
    shutil.copyfile(first, pile / "copy.jpg")
    return [*((f"unlabelled/{name}", "bad") for name in bad), ("unlabelled/copy.jpg", "copy")]


# --- the job ---------------------------------------------------------------------------------


def judge(root: Path, data: Path, params: str = "") -> list[tuple[str, str]]:
    """Run the whole job on a folder with its truth beside it; rows of a table."""
    given = f"data.source=folder,data.root={root},data_folder={data}" + (params and f",{params}")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "DO_NOT_TRACK": "1",
    }
    began = time.monotonic()
    command = [sys.executable, "-m", "kedro", "run", "--params", given]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # KiB on Linux; the largest of all processes that were started.
    peak = used.ru_maxrss / 2**20
    stored = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    reporting = data / "08_reporting" / "main"
    truth = pd.read_csv(truth_of(root), dtype=str).set_index("path")["kind"]
    ranking = pd.read_csv(reporting / "ranking.csv", keep_default_na=False)
    ranking = ranking.assign(kind=ranking["path"].map(truth))
    ranked = ranking[ranking["kind"].isin(["useful", "foreign"])]
    useful = ranked["kind"] == "useful"
    kept = ranked["kept"].astype(str) == "True"
    copied = ranking["near_duplicate_of"] != ""
    rejected = set(pd.read_csv(reporting / "rejected_files.csv")["path"])
    bad = set(truth.index[truth == "bad"])
    metrics = json.loads((reporting / "summary.json").read_text())
    counts = Counter(truth)
    return [
        ("files in the pile", f"{len(truth):,} ({dict(sorted(counts.items()))})"),
        ("time from the folder to the report", f"{seconds / 60:.1f} min"),
        ("processor time", f"{(used.ru_utime + used.ru_stime) / 60:.1f} min"),
        ("peak memory of the largest process", f"{peak:.1f} GiB"),
        ("files that the job wrote", f"{stored / 2**30:.2f} GiB"),
        ("AUROC of the ranking", f"{roc_auc_score(useful, ranked['score'].astype(float)):.3f}"),
        ("useful images kept", f"{100 * kept[useful].mean():.0f} %"),
        ("foreign images kept", f"{100 * kept[~useful].mean():.0f} %"),
        ("bad files named", f"{len(bad & rejected)} of {len(bad)}"),
        ("good files rejected", str(len(rejected - bad))),
        *(
            (f"accuracy, {arm}", f"{row['accuracy']:.1f} %, {row['seeds']:.0f} seeds")
            for arm, row in metrics["arms"].items()
        ),
        *(
            (f"copies found: {kind}", f"{copied[ranking['kind'] == kind].sum()} of {counts[kind]}")
            for kind in ("copy", *AGAIN)
            if counts[kind]
        ),
        ("other files taken for copies", str(copied[ranked.index].sum())),
        ("verdict", metrics["pile"]["verdict"]),
    ]


def truth_of(root: Path) -> Path:
    """The file beside a folder that says what each file of its pile is."""
    return root.with_name(f"{root.name}.truth.csv")


def write_truth(root: Path, rows: Rows) -> None:
    """Write the file beside the folder."""
    with truth_of(root).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "kind"), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do what it asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["generated", "cifar10", "judge"])
    parser.add_argument("folder", type=Path, help="the folder of own images")
    parser.add_argument("--files", type=int, default=100_000, help="files in the generated pile")
    parser.add_argument("--source", type=Path, help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--pool", type=int, default=3000, help="files of CIFAR-10 in the pile")
    parser.add_argument("--labels", type=int, help="labelled files; 100, or 120 of CIFAR-10")
    parser.add_argument("--test", type=int, default=0, help="files of the test folder")
    parser.add_argument("--mixed", action="store_true", help="generate files such as people have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="the folder for what the job writes")
    parser.add_argument("--params", default="", help="further parameters of the job")
    asked = parser.parse_args(arguments)
    root = asked.folder.resolve()
    if asked.what == "judge":
        if asked.data is None:
            parser.error("judge needs --data, a folder for what the job writes")
        rows = judge(root, asked.data.resolve(), asked.params)
        note = conditions(["weighmatch", "torchvision"])
        show("A whole job on own images", markdown(["what", "found"], rows), note)
        return
    if root.exists():
        parser.error(f"{root} exists; choose a new folder")
    if asked.what == "generated":
        sizes = (asked.files, asked.labels or 100, asked.test)
        write_truth(root, generate(root, *sizes, asked.seed, asked.mixed))
    elif asked.source is None or not (asked.source / "train").is_dir():
        parser.error("cifar10 needs --source, a folder with train/<class>/ and test/<class>/")
    else:
        labels = asked.labels or 120
        write_truth(root, lay_out(root, asked.source, labels, asked.pool, asked.test, asked.seed))


if __name__ == "__main__":
    main()
