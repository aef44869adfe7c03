"""The parts but the IHVPs: agreement, augmentation, training, learned weights, the open set."""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.augmentation import images_of, ours
from benchmarks.gpu import records, training
from benchmarks.gpu.device import copied_a_second, graphed, peak_memory, synchronising_lines
from benchmarks.gpu.session import Bench, Budget, OutOfTimeError
from benchmarks.timing import by_turns, seconds_of, top_operations

ROOT = Path(__file__).parents[2]
TESTS = "tests/test_gpu_device.py"
LABELS_PER_CLASS = 5
# Seconds that compiling the network on a GPU may take, from nothing.
COMPILING = 45.0


def agreement(record: records.Agreement, bench: Bench, budget: Budget) -> None:
    """The GPU tests, and a tiny training on the CPU beside the same on the device.

    Raises:
        RuntimeError: if a test fails or the two are further apart than the tolerance.
    """
    for arm in training.ARMS:
        if budget.allows(f"{arm} on both devices"):
            record.arms.append(compare(arm, bench.device.type, bench.folder))
    if importlib.util.find_spec("pytest") is None:
        record.tests = "not run: pytest is not installed"
    elif budget.allows("the GPU tests"):
        _run_tests(record, budget)
    unequal = [arm.arm for arm in record.arms if not arm.equal]
    if unequal:
        raise RuntimeError(f"CPU and {bench.device.type} disagree: {', '.join(unequal)}")
    if record.tests_failed:
        raise RuntimeError(f"GPU tests failed: {record.tests}")


def compare(arm: str, device: str, folder: Path) -> records.ArmAgreement:
    """The same run on the CPU and on the device."""
    on_cpu = training.short_run(arm, "cpu", folder)
    # On the CPU as well in a rehearsal, in a folder of its own so that it is not taken up again.
    there = training.short_run(arm, device, folder / "device")
    loss = _distance(there.losses, on_cpu.losses)
    parameters = _distance(there.parameters, on_cpu.parameters)
    tolerance = training.TOLERANCE
    equal = max(loss, parameters) <= tolerance
    return records.ArmAgreement(arm, training.COMPARED_STEPS, tolerance, loss, parameters, equal)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _run_tests(record: records.Agreement, budget: Budget) -> None:
    # Without the options of pyproject.toml, which ask for pytest-xdist.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", TESTS]
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(budget.left(), 1.0),
            check=False,
        )
    except subprocess.TimeoutExpired:
        budget.not_done.append("the GPU tests")
        return
    said = (done.stdout or done.stderr).strip().splitlines() or ["nothing"]
    record.tests, record.tests_failed = said[-1], done.returncode != 0


def augmentation(record: records.Views, bench: Bench, budget: Budget) -> None:
    """Pairs of views a second, against what the memory allows."""
    side = bench.images.images.shape[-1]
    record.copied_a_second = copied_a_second(bench.device, 2**20 if bench.tiny else 2**30)
    record.bytes_a_pair = 3 * side * side * (1 + 2 * 4)
    record.limit = record.copied_a_second / record.bytes_a_pair
    views = ours()
    for count in (16, 32) if bench.tiny else (448, 2048, 8192, 32768):
        if not budget.allows(f"{count:,} images at once", 2.0 if count > 10_000 else 0.0):
            continue
        call = partial(views, images_of(count, side, bench.device.type))
        times = by_turns({"views": call}, 2 if bench.tiny else 9, budget.spent)["views"]
        record.rates.append(records.Rate(count, count / statistics.median(times)))
        record.pairs_a_second = max(rate.pairs_a_second for rate in record.rates)
        record.share_of_limit = record.pairs_a_second / record.limit
        record.operations = top_operations(call, bench.device, 1, 10)


def steps(record: records.Steps, bench: Bench, budget: Budget) -> None:
    """FixMatch's step in each way to run the network, beside the bare loop."""
    setting = training.fixmatch_setting(bench)
    config = setting.training
    record.network, record.precision = config.network, config.precision
    record.labelled = config.batch_size
    record.unlabelled = config.batch_size * config.unlabelled_ratio
    with training.fastest():
        for name, options in training.WAYS.items():
            compiled = options is not None
            if not budget.allows(name, COMPILING if compiled and not bench.tiny else 0.0):
                continue
            if compiled and bench.tiny:
                options = {"backend": "eager"}  # the call without the compiler
            variant = records.Variant(name)
            record.variants.append(variant)
            try:
                _measure_steps(variant, record, bench, budget, options)
            except Exception as failure:  # the other ways may work
                variant.error = f"{type(failure).__name__}: {failure}".splitlines()[0]


def _measure_steps(
    variant: records.Variant,
    record: records.Steps,
    bench: Bench,
    budget: Budget,
    options: dict[str, object] | None,
) -> None:
    setting = training.fixmatch_setting(bench)
    run = training.start(setting, bench.folder / variant.name, options)
    count = training.steps_at_once(run, bench)
    block = partial(run.train_steps, count)
    first = seconds_of(block)
    # The share of its time that is left, so that no way takes that of the others.
    ends = time.monotonic() + budget.left() / 2
    calls: dict[str, Callable[[], object]] = {
        "step": block,
        "bare": training.bare_loop(run, count),
    }
    times = by_turns(
        calls, 2 if bench.tiny else 15, lambda: time.monotonic() > ends or budget.spent()
    )
    seconds = statistics.median(times["step"])
    variant.warm_up = first - seconds
    variant.steps_a_second = count / seconds
    variant.images_a_second = training.images_in_step(setting.training) * count / seconds
    variant.share_of_bare = statistics.median(
        bare / own for bare, own in zip(times["bare"], times["step"], strict=True)
    )
    memory = peak_memory(block, bench.device)
    variant.peak_memory = memory and memory.peak
    lines = synchronising_lines(block, bench.device)
    if lines is not None:
        variant.synchronisations = len(lines) / count
    if options is not None:
        return
    if lines is not None:
        record.counted_steps = count
        record.places = [records.Place(*item) for item in Counter(lines).most_common()]
    record.operations = top_operations(block, bench.device, count, 10)
    if not budget.allows("the bare loop as a CUDA graph", 5.0 if not bench.tiny else 0.0):
        return
    replay = graphed(training.bare_loop(run, 1), bench.device)
    if replay is not None:
        times = by_turns({"graph": replay}, 20, budget.spent)
        record.graphed_bare_steps_a_second = 1 / statistics.median(times["graph"])


def learned(record: records.Learned, bench: Bench, budget: Budget) -> None:
    """What learned weights take beside FixMatch: while training, and in rounds."""
    setting = training.fixmatch_setting(bench)
    with training.fastest():
        rounds = 1 if bench.tiny else 7
        times = training.learned_times(setting, rounds, bench.folder / "learned", budget.spent)
        record.fixmatch_step, record.learned_step = times.fixmatch, times.learned
        record.update, record.interval = times.update, times.interval
        record.overhead, record.overhead_of_run = times.overhead, times.overhead_of_run
        if not budget.allows("a ranking of the pool"):
            return
        run = training.start(setting, bench.folder / "ranking", None)
        run.train_steps(setting.steps)
        ranking = by_turns(
            {"ranking": partial(training.rank, run, setting)}, 1 if bench.tiny else 2, budget.spent
        )["ranking"]
    record.ranked = len(setting.data.unlabelled_images)
    record.ranking = statistics.median(ranking)
    record.rounds, record.run_steps = training.ROUNDS, setting.run_steps
    rankings = training.ROUNDS * record.ranking
    record.overhead_in_rounds = 1 + rankings / (setting.run_steps * record.fixmatch_step)


def openset(record: records.OpenSet, bench: Bench, budget: Budget) -> None:
    """FixMatch and learned weights, six classes seen, as many steps as fit."""
    data = training.open_set(bench.images, LABELS_PER_CLASS)
    record.images, record.labels_per_class = bench.images.name, LABELS_PER_CLASS
    record.pool, record.foreign = len(data.training.unlabelled_images), data.foreign
    setting = training.fixmatch_setting(bench)
    with training.fastest():
        run = training.start(setting, bench.folder / "pace", None)
        block = partial(run.train_steps, setting.steps)
        block()
        pace = seconds_of(block) / setting.steps
        del run, block
    # Both arms take as many; rankings and the test are given a quarter of an arm's time.
    planned = 8 if bench.tiny else max(training.ROUNDS, int(budget.left() / (2.25 * pace)))
    config = training.training_of(bench, steps=planned, checkpoint_every=planned, snapshots=1)
    for arm in training.ARMS:
        if not budget.allows(f"{arm} on the open set"):
            continue
        done, began, checkpoint = 0, time.monotonic(), None

        def progress(count: int) -> None:
            nonlocal done
            done += count
            if budget.spent():
                raise OutOfTimeError

        try:
            checkpoint = training.trained(arm, data, config, bench.folder, progress)
        except OutOfTimeError:
            budget.not_done.append(f"the end of {arm} on the open set")
        seconds = time.monotonic() - began
        share = None
        if checkpoint is not None:
            share = training.accuracy(checkpoint, data, bench.device)
        name = f"{arm} in {training.ROUNDS} rounds" if arm == "learned" else arm
        record.arms.append(records.Accuracy(name, done, planned, seconds, share))
