"""Faults of the table of `benchmarks.reliability`: each function is one trial at tiny size."""

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
JOB = "test"
LATER = ("training", "scoring", "evaluation", "ihvp_analysis", "reporting")
STAGES = ("data_preparation,feature_extraction", *LATER)
# What is trained in every trial, unless it says otherwise.
ARMS = {"runs.arms": "fixmatch+learned+oracle", "runs.schedule": "online"}
# Which pipelines read a file, by a part of its path.
READERS = {
    "01_raw": "data_preparation",
    "04_feature": "training",
    "_sets": "training",
    "evaluation_images": "scoring",
    "ood_truth": "training,evaluation",
    "test_labels": "evaluation",
    "manifest.json": "scoring",
    "checkpoints": "scoring",
    "_runs.parquet": "scoring",
    "07_model_output": "evaluation,reporting",
    "08_reporting": "reporting",
    "09_records": "training,scoring,evaluation,reporting",
    "/runs/": "training",
}


class LostError(AssertionError):
    """What went wrong in a trial."""


# --- runs of the project ---------------------------------------------------------------------


def command(folder: Path, names: str, **params: object) -> list[str]:
    """A run of pipelines of the job, with its files in a folder."""
    given = {**ARMS, **params} if "training" in names else params
    # A run refuses parameters that it does not read.
    readers = {"data": "data_preparation", "training": "training", "runs": "training"}
    given = {
        name: value
        for name, value in given.items()
        if readers.get(name.partition(".")[0], names) in names
    }
    listed = ",".join(f"{name}={value}" for name, value in {**given, "data_folder": folder}.items())
    kedro = [sys.executable, "-m", "kedro", "run", "--env", JOB]
    return [*kedro, "--pipelines", names, "--params", listed]


def start(folder: Path, names: str, **params: object) -> "subprocess.Popen[str]":
    """Start such a run, at low priority."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        ["nice", "-n", "10", *command(folder, names, **params)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(folder: Path, names: str, **params: object) -> str:
    """Run pipelines to their end; "" or the sentence that a run was refused with.

    Raises:
        LostError: if it ends with anything else.
    """
    process = start(folder, names, **params)
    output, _ = process.communicate()
    return sentence(output, process.returncode)


def sentence(output: str, code: int) -> str:
    """The one sentence of an error, or "" of a run that ended well."""
    if code == 0:
        return ""
    errors = re.findall(r"^Error: (.*)$", output, re.MULTILINE)
    if len(errors) != 1 or "Traceback" in output:
        raise LostError(f"no clear sentence, but exit code {code}: {output[-600:]}")
    return str(errors[0])


def cure(folder: Path, said: str, **params: object) -> None:
    """Run the pipelines that a sentence names.

    Raises:
        LostError: if it names none.
    """
    found = re.search(r"run the pipelines? (.*?)(?: again| as well)?$", said)
    if found is None:
        raise LostError(f"the error names no pipeline to run: {said}")
    names = found[1].replace(" and ", ", ").split(", ")
    again = run(folder, ",".join(names), **params)
    if again:
        raise LostError(f"after {said!r} its cure says: {again}")


def finish(folder: Path, names: str, tries: int = 4, **params: object) -> list[str]:
    """Run pipelines, and what their errors name, until they end well; returns the errors."""
    said: list[str] = []
    for _ in range(tries):
        error = run(folder, names, **params)
        if not error:
            return said
        said.append(error)
        cure(folder, error, **params)
    raise LostError(f"not cured: {said}")


def result(folder: Path) -> dict[str, str]:
    """What all runs say of all images, by file; times are not in it."""
    found = {}
    for path in sorted((folder / "07_model_output" / JOB / "predictions").glob("*.npz")):
        with np.load(path) as arrays:
            digest = hashlib.sha256()
            for name in sorted(arrays.files):
                digest.update(name.encode() + arrays[name].tobytes())
        found[path.stem] = digest.hexdigest()
    return found


def require_same(folder: Path, expected: dict[str, str]) -> None:
    """Refuse a result that is not the expected one."""
    found = result(folder)
    if found != expected:
        wrong = sorted(name for name in expected if found.get(name) != expected[name])
        raise LostError(f"another result, of {wrong or sorted(set(found) - set(expected))}")


class Workshop:
    """Finished folders, made once, that trials begin from."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self._made: dict[str, Path] = {}
        self._count = 0

    def finished(self, names: Sequence[str], **params: object) -> Path:
        """A folder in which these pipelines have been run; not to be changed."""
        key = repr((names, params))
        if key not in self._made:
            folder = self.folder / f"finished_{len(self._made)}"
            said = run(folder, ",".join(names), **params)
            if said:
                raise RuntimeError(f"the undisturbed run failed: {said}")
            self._made[key] = folder
        return self._made[key]

    def copy(self, names: Sequence[str], **params: object) -> Path:
        """A copy of such a folder, without times."""
        self._count += 1
        folder = self.folder / f"trial_{self._count}"
        shutil.copytree(self.finished(names, **params), folder, copy_function=shutil.copyfile)
        return folder


# --- flipped bits ----------------------------------------------------------------------------


def flip_a_bit(path: Path, choose: random.Random) -> None:
    """Flip a random bit of a file."""
    content = bytearray(path.read_bytes())
    place = choose.randrange(len(content))
    content[place] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def files_of_kind(folder: Path, pattern: str) -> list[Path]:
    """Files that some pipeline reads."""
    return [path for path in sorted(folder.rglob(pattern)) if readers_of(path) and path.is_file()]


def readers_of(path: Path) -> str:
    """The pipelines that read a file, joined by commas, or ""."""
    if "/runs/" in str(path):
        return "training" if path.suffix == ".pt" else ""
    if path.name in ("report.html", "training_log.parquet") or "/reporting/" in str(path):
        return ""
    return next((names for part, names in READERS.items() if part in str(path)), "")


def flipped(shop: Workshop, pattern: str) -> None:
    """A flipped bit in a file: read what reads it, and go on to the end."""
    folder = shop.copy(STAGES)
    expected = result(folder)
    path = shop.random.choice(files_of_kind(folder, pattern))
    flip_a_bit(path, shop.random)
    finish(folder, readers_of(path))
    finish(folder, "scoring,evaluation,reporting")
    require_same(folder, expected)


def flipped_unfinished(shop: Workshop, name: str) -> None:
    """A flipped bit in a file of a run that is not finished: it goes on by itself."""
    more = {"runs.schedule": "rounds" if name == "ranking.pt" else "online"}
    folder = shop.copy(STAGES[:3], **more)
    expected = result(folder)
    runs = folder / "06_models" / JOB / "runs"
    flip_a_bit(shop.random.choice(sorted(runs.rglob(name))), shop.random)
    for path in runs.rglob("run.pt"):
        if name != "run.pt":
            path.unlink()
    said = run(folder, "training,scoring", **more)
    if said:
        raise LostError(f"it did not go on: {said}")
    require_same(folder, expected)


# --- kills -----------------------------------------------------------------------------------


def kill(process: "subprocess.Popen[str]") -> None:
    """End the process itself as the kernel does; its workers have to notice."""
    os.kill(process.pid, signal.SIGKILL)  # nice has become the run itself
    process.communicate()


def descendants(process: int) -> list[int]:
    """Numbers of the processes that a process started, directly or not."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    children = [int(number) for number in text.split()]
    return children + [other for child in children for other in descendants(child)]


def killed(shop: Workshop, schedule: str) -> None:
    """Training is killed twice at random times, and then goes on to the same end."""
    more = {"runs.schedule": schedule, "runs.arms": "fixmatch+learned"}
    expected = result(shop.finished(STAGES[:3], **more))
    folder = shop.copy(STAGES[:1])
    for _ in range(2):
        process = start(folder, "training", **more)
        wait_for(folder / "06_models" / JOB / "runs", process)
        time.sleep(shop.random.uniform(0, 6))
        kill(process)
    said = run(folder, "training,scoring", **more)
    if said:
        raise LostError(said)
    require_same(folder, expected)
    left = [path.name for path in folder.rglob("*") if path.suffix in (".partial", ".lock")]
    if left:
        raise LostError(f"left behind: {left}")


def killed_preparation(shop: Workshop) -> None:
    """Preparation of other data is killed; the old results are not taken for those of the new."""
    folder = shop.copy(STAGES[:4])
    more = {"data.ratio": 0.25}
    expected = result(shop.finished(STAGES[:3], **more))
    process = start(folder, "data_preparation", **more)
    changed = folder / "05_model_input" / JOB / "training_sets" / "files.json"
    before = changed.stat().st_mtime_ns
    while process.poll() is None and changed.stat().st_mtime_ns == before:
        time.sleep(0.002)
    time.sleep(shop.random.uniform(0, 0.05))
    kill(process)
    finish(folder, "training,scoring,evaluation", **more)
    if result(folder) not in (expected, result(shop.finished(STAGES[:4]))):
        raise LostError("a result of mixed data")


def killed_study(shop: Workshop) -> None:
    """A study is killed at a random time, and goes on to the same table."""
    folder, expected = shop.folder / f"study_{shop.random.random()}", shop.finished(STAGES)
    more = {"ihvp_analysis.workers": shop.random.choice([1, 2])}
    process = start(folder, "ihvp_analysis", **more)
    time.sleep(shop.random.uniform(3, 9))
    kept = folder / "06_models" / JOB / "runs"
    kill(process)
    finished = set(kept.rglob("*.pickle"))
    said = run(folder, "ihvp_analysis", **more)
    if said:
        raise LostError(said)
    if not finished <= set(kept.rglob("*.pickle")):
        raise LostError("finished cells are gone")
    require_same_study(folder, expected)


def killed_study_worker(shop: Workshop) -> None:
    """A worker of a study is killed; its cell is done again."""
    folder, expected = shop.folder / f"study_{shop.random.random()}", shop.finished(STAGES)
    process = start(folder, "ihvp_analysis", **{"ihvp_analysis.workers": 2})
    workers: list[int] = []
    while not workers and process.poll() is None:
        workers = [number for number in descendants(process.pid) if is_worker(number)]
        time.sleep(0.05)
    time.sleep(shop.random.uniform(0, 5))
    with contextlib.suppress(ProcessLookupError):
        os.kill(shop.random.choice(workers), signal.SIGKILL)
    output, _ = process.communicate()
    said = sentence(output, process.returncode)
    if said:
        raise LostError(said)
    require_same_study(folder, expected)


def require_same_study(folder: Path, other: Path) -> None:
    """Refuse a table of a study that differs in more than times."""
    name = Path("07_model_output") / JOB / "ihvp_comparison.parquet"
    found, expected = (pd.read_parquet(place / name) for place in (folder, other))
    same = [c for c in expected if not re.search("seconds|gradients$|memory", c)]
    if not found[same].equals(expected[same]):
        raise LostError("another table")


def hit_worker(shop: Workshop, hit: Callable[[int], None]) -> None:
    """A worker process is killed or starved; training goes on or says so, and loses nothing."""
    expected = result(shop.finished(STAGES[:3]))
    folder = shop.copy(STAGES[:1])
    process = start(folder, "training", **{"runs.workers": 2})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not begun(folder):
        time.sleep(0.05)
    workers = [number for number in descendants(process.pid) if is_worker(number)]
    time.sleep(shop.random.uniform(0, 1))
    if not workers:
        raise LostError("no worker was found")
    with contextlib.suppress(ProcessLookupError):
        hit(shop.random.choice(workers))
    output, _ = process.communicate()
    said = sentence(output, process.returncode)
    names = "training,scoring" if "memory ran out" in said else "scoring"
    if (said and names == "scoring") or (said := run(folder, names)):
        raise LostError(said)
    require_same(folder, expected)


def begun(folder: Path) -> bool:
    """Whether a training has begun; os.walk goes on where a folder is removed meanwhile."""
    return any("metrics.jsonl" in names for _, _, names in os.walk(folder))


def is_worker(process: int) -> bool:
    """Whether a process is one that trains."""
    with contextlib.suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def wait_for(path: Path, process: "subprocess.Popen[str]", seconds: float = 60) -> None:
    """Wait until a path exists or the process has ended."""
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


# --- two runs, and mixed folders -------------------------------------------------------------


def two_at_once(shop: Workshop, other: bool) -> None:
    """Two runs write to one folder: one is done, the other is told of it."""
    params = [{}, {"data.ratio": 0.25} if other else {}]
    folder = shop.folder / f"two_{shop.random.random()}"
    names = ",".join(STAGES[:3])
    processes = [start(folder, names, **given) for given in params]
    outputs = [process.communicate()[0] for process in processes]
    said = [sentence(o, p.returncode) for o, p in zip(outputs, processes, strict=True)]
    done = [given for given, error in zip(params, said, strict=True) if not error]
    refused = [error for error in said if error]
    if len(done) != 1 or "another run writes to what this one writes to" not in refused[0]:
        raise LostError(f"{len(done)} runs ended well: {said}")
    require_same(folder, result(shop.finished(STAGES[:3], **done[0])))


def missing(shop: Workshop) -> None:
    """A random file of a seed or run is deleted."""
    folder = shop.copy(STAGES)
    expected = result(folder)
    found = [*files_of_kind(folder, "*.npz"), *files_of_kind(folder / "06_models", "*.pt")]
    path = shop.random.choice([p for p in found if "/runs/" not in str(p)])
    path.unlink()
    said = finish(folder, readers_of(path))
    if not said and "01_raw" not in str(path) and "oracle_sets" not in str(path):
        raise LostError(f"nothing was said of {path.name}")
    finish(folder, "scoring,evaluation")
    require_same(folder, expected)


def extra(shop: Workshop) -> None:
    """A file of the user's lies in a folder of partitions."""
    folder = shop.copy(STAGES[:4])
    expected = result(folder)
    place = shop.random.choice(["training_sets", "evaluation_images", "ood_truth", "test_labels"])
    mine = folder / "05_model_input" / JOB / place / "mine-seed_0009.npz"
    np.savez(mine, x=np.ones(1))
    for stage in STAGES[:4]:
        finish(folder, stage)
    if not mine.exists():
        raise LostError("the file of the user's was deleted")
    require_same(folder, expected)


def mixed(shop: Workshop) -> None:
    """Data are prepared anew, with another size or ratio, under old results."""
    folder = shop.copy(STAGES)
    more = shop.random.choice(
        [
            {"data.ratio": 0.25},
            {"data.test_size": 48},
            {"data.pool_size": 60},
            {"data.heldout_size": 24},
        ]
    )
    run(folder, "data_preparation", **more)
    stage = shop.random.choice(["scoring", "evaluation", "reporting"])
    said = run(folder, stage)
    if "was made from other" not in said:
        raise LostError(f"{stage} said {said!r} of data prepared with {more}")
    cure(folder, said)
    if stage == "scoring":
        finish(folder, stage)
    require_same(folder, result(shop.finished(STAGES[:3], **more)))


def diverging(shop: Workshop) -> None:
    """A loss that diverges is a sentence with arm, seed and parameter, or a finite result."""
    rate = 10 ** shop.random.uniform(0, 1.99)
    arm = shop.random.choice(["fixmatch", "learned"])
    schedule = shop.random.choice(["online", "two_stages", "rounds"])
    folder = shop.copy(STAGES[:1])
    more = {"training.learning_rate": rate, "training.momentum": 0.99}
    more |= {"runs.arms": arm, "runs.schedule": schedule}
    said = run(folder, "training", **more) or run(folder, "scoring")
    if said:
        if not re.search(rf"{arm}, seed [01]: .*lower training\.learning_rate", said):
            raise LostError(said)
        return
    for path in folder.rglob("predictions/*.npz"):
        with np.load(path) as arrays:
            if not np.isfinite(arrays["test_probabilities"]).all():
                raise LostError(f"{path.name} is not finite")
