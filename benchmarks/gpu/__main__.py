"""All that is to be measured on a GPU, in minutes; see benchmarks/README.md.

    python -m benchmarks.gpu --out DIR [--cifar DIR] [--minutes 6] [--only training,ihvps]
    python -m benchmarks.gpu --out DIR --tiny --device cpu      # a rehearsal of every part
    python -m benchmarks.gpu --table DIR/gpu.json               # the table of docs/results/speed.md

Prints a line a part and writes each to `gpu.json` as soon as it is done, so that a run that is cut
keeps what it has. A part that fails does not stop the others; the exit status is then 1.
"""

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu import parts
from benchmarks.gpu.ihvps import ihvps
from benchmarks.gpu.images import ImageSet, from_folder, generated
from benchmarks.gpu.records import Document
from benchmarks.gpu.session import Bench, Row, run_parts
from benchmarks.gpu.table import lines
from benchmarks.tables import processor

ROWS = (
    Row("agreement", 0.12, parts.agreement),
    Row("augmentation", 0.06, parts.augmentation),
    Row("training", 0.38, parts.steps),
    Row("learned", 0.10, parts.learned),
    Row("ihvps", 0.22, ihvps),
    Row("openset", 0.12, parts.openset),
)
PACKAGES = ("torch", "numpy", "pillow", "tqdm", "curvlinops-for-pytorch", "triton", "pytest")


def main() -> None:
    """Measure, or print the table of what was measured."""
    arguments = _arguments()
    ends = time.monotonic() + 60 * arguments.minutes
    if arguments.table is not None:
        print("\n".join(lines(json.loads(arguments.table.read_text()))))
        return
    torch.set_num_threads(1)  # as many as a run has
    device = torch.device(arguments.device)
    images = _images(arguments.cifar, arguments.tiny)
    document = Document(
        device=torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        commit=_commit(),
        images=images.name,
        rehearsal=arguments.tiny,
        minutes=arguments.minutes,
    )
    rows = [row for row in ROWS if row.name in arguments.only]
    out = arguments.out / "gpu.json"
    print(f"{document.device}, {document.images}, commit {document.commit}, {out}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, images, arguments.tiny, Path(folder))
        good = run_parts(rows, bench, document, out, ends)
    raise SystemExit(0 if good else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Everything that is to be measured on a GPU.")
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    parser.add_argument("--cifar", type=Path, help="train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: sizes that mean nothing")
    names = [row.name for row in ROWS]
    parser.add_argument("--only", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--table", type=Path, help="print the table of this gpu.json, no more")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    unknown = sorted(set(arguments.only) - set(names))
    if unknown:
        parser.error(f"--only {', '.join(unknown)} is unknown; choose from {', '.join(names)}")
    if arguments.table is None:
        if arguments.out is None:
            parser.error("--out DIR is missing: where gpu.json goes")
        if not arguments.minutes > 0:
            parser.error(f"--minutes must be above 0, got {arguments.minutes}")
        if arguments.device == "cuda" and not torch.cuda.is_available():
            parser.error("torch sees no GPU; rehearse with --tiny --device cpu")
        if arguments.device == "cpu" and not arguments.tiny:
            parser.error("--device cpu is for a rehearsal; add --tiny")
    return arguments


def _images(folder: Path | None, tiny: bool) -> ImageSet:
    if folder is not None:
        return from_folder(folder, 20, every=4) if tiny else from_folder(folder)
    return generated(200, 60, 8) if tiny else generated(50_000, 10_000, 32)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The repository's, with "+" after it where tracked files differ; "unknown" without Git."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        call = ["git", "-C", str(root), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "-s", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
