"""A step of training beside the bare loop, and what learned weights add to it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.tables import markdown, spread
from benchmarks.timing import by_turns, seconds_of, top_operations
from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import load_photographs
from weighmatch.data.source import get_source
from weighmatch.data.sources.digits import load_digits
from weighmatch.data.sources.glyphs import CHARACTERS, GlyphConfig, render
from weighmatch.semisup.config import TrainingConfig, WeightingConfig
from weighmatch.semisup.training.batches import CHUNK
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.jobs import Job, finish_jobs
from weighmatch.semisup.training.judges import Known
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.ranking import rank_pool
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.semisup.weightings.meter import PROBE_EVERY

FOREVER = 10**9


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        name: for the table.
        data: images; only their shape matters here.
        training: the configuration.
        steps: steps that are timed together.
        updated_steps: steps that are timed together where the last of them updates the weights.
        run_steps: steps of a whole run, which rankings of the pool are a part of.
        turns: rounds of timing, for one where a step takes long.
    """

    name: str
    data: TrainingSet
    training: TrainingConfig
    steps: int
    updated_steps: int
    run_steps: int
    turns: int = 1


def digits_cnn(training: TrainingConfig, pool: int = 600) -> Setting:
    """The default: a small CNN on 8×8 digits, a pool of 600 or of as many as wanted, repeated."""
    images, _ = load_digits()
    unlabelled = np.resize(images[100:], (pool, *images.shape[1:]))
    data = TrainingSet(images[:24], np.arange(24) % 6, unlabelled)
    interval = training.weighting.interval
    # As many steps as training itself augments together.
    return Setting("CNN on digits", data, training, CHUNK, interval, training.steps, turns=3)


def training_set(config: DataConfig) -> TrainingSet:
    """What `kedro run` trains on with its first seed."""
    source = get_source(config.source)
    splits = source.draw(source.load(config), config, config.seeds[0])
    return TrainingSet(splits.labelled_images, splits.labels, splits.pool.images)


def wide_resnet(
    training: TrainingConfig, pool: int = 4096, labelled: int = 40, steps: int = 2
) -> Setting:
    """A WRN-28-2 on 32×32 glyphs in colour, ten classes."""
    letters = np.arange(labelled + pool) % 10
    glyphs = GlyphConfig(seen=CHARACTERS[:10], unseen=CHARACTERS[10:], size=32, channels=3)
    same = np.zeros(len(letters), bool)
    rng = np.random.default_rng(0)
    images = render(letters, "train", same, glyphs, load_photographs(), rng)
    data = TrainingSet(images[:labelled], letters[:labelled], images[labelled:])
    training = replace(training, network="wrn_28_2")
    # Few for such a network (Sohn et al., 2020, take 2^20), so that rankings rather count too much.
    return Setting("WRN-28-2 at 32×32", data, training, steps, steps, run_steps=10_000)


def start_run(arm: str, setting: Setting, folder: Path, interval: int = FOREVER) -> Run:
    """A run whose steps are taken one block at a time, with nothing saved in between."""
    # Any confidence passes, so that an untrained network's step does all that a trained one's
    # does.
    weighting = replace(setting.training.weighting, warmup=0.0, interval=interval)
    training = replace(setting.training, threshold=1e-6, snapshots=1, weighting=weighting)
    classes = setting.data.classes
    config = RunConfig(arm, 0, FOREVER, classes, replace(training, checkpoint_every=FOREVER))
    return Run(config, setting.data, folder / f"{arm}-{interval}-{setting.name.split()[0]}")


def bare_loop(run: Run, steps: int) -> Callable[[], None]:
    """Passes, gradients and the optimiser's step on a fixed batch of the same shape."""
    batch = run.batches.draw(1)[0]
    assert batch.weak is not None
    weak, optimizer = batch.weak, run.optimizer
    targets = torch.zeros(len(batch.images), dtype=torch.long, device=run.device)
    half = run.training.precision == "bfloat16"

    def loop() -> None:
        for _ in range(steps):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=half):
                with torch.no_grad():
                    run._forward(weak)
                logits = run._forward(batch.images)
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return loop


@dataclass(frozen=True)
class StepTimes:
    """Seconds by round: of a step, and of one update of the weights without and with a probe."""

    bare: list[float]
    fixmatch: list[float]
    learned: list[float]
    update: list[float]
    probing_update: list[float]

    def overheads(self, weighting: WeightingConfig) -> list[float]:
        """The learned arm's step, its share of an update included, over FixMatch's."""
        found = []
        for step, own, update, probing in zip(
            self.fixmatch, self.learned, self.update, self.probing_update, strict=True
        ):
            mean = (probing + (PROBE_EVERY - 1) * update) / PROBE_EVERY
            found.append((own + mean / weighting.interval) / step)
        return found

    def run_overheads(self, weighting: WeightingConfig) -> list[float]:
        """The same over a whole run, of which the first `warmup` learns no weights."""
        return [1 + (1 - weighting.warmup) * (o - 1) for o in self.overheads(weighting)]

    def updates_in_steps(self) -> list[float]:
        """One update over one step of FixMatch."""
        return [u / s for u, s in zip(self.update, self.fixmatch, strict=True)]


def time_steps(
    setting: Setting, rounds: int, folder: Path, enough: Callable[[], bool] = lambda: False
) -> StepTimes:
    """All by turns, on one thread of a CPU or on a GPU.

    An update is what a block of steps takes longer with one at its end. `enough` ends the rounds
    early, as in `by_turns`.
    """
    count, updated_count = setting.steps, setting.updated_steps
    plain, learned = start_run("fixmatch", setting, folder), start_run("learned", setting, folder)
    updated = start_run("learned", setting, folder, interval=updated_count)
    meter = updated.weighting.meter
    assert meter is not None
    # One that was never updated would score images on the fly.
    updated.train_steps(updated_count)
    learned.weighting.load_state_dict(updated.weighting.state_dict())

    def block(*, probing: bool) -> None:
        meter.updates = 0 if probing else 1
        updated.train_steps(updated_count)

    calls: dict[str, Callable[[], object]] = {
        "bare": bare_loop(plain, count),
        "fixmatch": lambda: plain.train_steps(count),
        "learned": lambda: learned.train_steps(count),
        "block": lambda: learned.train_steps(updated_count),
        "update": lambda: block(probing=False),
        "probing_update": lambda: block(probing=True),
    }
    times = by_turns(calls, rounds * setting.turns, enough)
    blocks = times.pop("block")
    for name in ("update", "probing_update"):
        times[name] = [whole - steps for whole, steps in zip(times[name], blocks, strict=True)]
    for name in ("bare", "fixmatch", "learned"):
        times[name] = [seconds / count for seconds in times[name]]
    return StepTimes(**times)


def step_table(settings: list[Setting], rounds: int, folder: Path) -> list[str]:
    """A row a setting; all figures but the milliseconds are ratios within a round."""
    rows = []
    for setting in settings:
        times = time_steps(setting, rounds, folder)
        images = setting.training.batch_size * (1 + setting.training.unlabelled_ratio)
        rows.append(
            [
                setting.name,
                f"{1e3 * statistics.median(times.fixmatch):.3g}",
                f"{images / statistics.median(times.fixmatch):,.0f}",
                spread([b / s for b, s in zip(times.bare, times.fixmatch, strict=True)]),
                spread([o / s for o, s in zip(times.learned, times.fixmatch, strict=True)]),
                spread(times.updates_in_steps()),
                spread(times.overheads(setting.training.weighting)),
                spread(times.run_overheads(setting.training.weighting)),
            ]
        )
    header = ["problem", "ms a FixMatch step", "images a second", "bare loop / FixMatch"]
    header += ["learned step without update / FixMatch", "one update in steps"]
    header += ["learned arm / FixMatch, updates included", "over a run, warm-up included"]
    return markdown(header, rows)


def ranking_table(settings: list[Setting], stages: int, rounds: int, folder: Path) -> list[str]:
    """What a ranking of the pool by the learned arm takes, and all rankings of a run in rounds."""
    rows = []
    for setting in settings:
        run = start_run("fixmatch", setting, folder)
        times = by_turns(
            {
                "steps": partial(run.train_steps, setting.steps),
                "ranking": partial(rank, run, setting),
            },
            rounds,
        )
        in_steps = [
            setting.steps * ranking / steps
            for ranking, steps in zip(times["ranking"], times["steps"], strict=True)
        ]
        rows.append(
            [
                setting.name,
                f"{len(setting.data.unlabelled_images):,}",
                spread(in_steps),
                f"{setting.run_steps:,}",
                spread([1 + stages * count / setting.run_steps for count in in_steps]),
            ]
        )
    header = ["problem", "images in the pool", "one ranking in steps", "steps of a run"]
    return markdown([*header, f"learned arm in {stages} rounds / FixMatch"], rows)


def whole_run_table(
    data: TrainingSet, training: TrainingConfig, stages: int, rounds: int, folder: Path
) -> list[str]:
    """Whole runs, checkpoints and all: FixMatch's, and the learned arm's online and in rounds."""
    learned = RunConfig("learned", 0, training.steps, data.classes, training)
    runs = {
        "FixMatch": replace(learned, arm="fixmatch"),
        "learned weights, online": learned,
        f"learned weights, {stages} rounds": replace(learned, schedule="rounds", rounds=stages),
    }

    def train(config: RunConfig) -> None:
        with TemporaryDirectory(dir=folder) as anew:
            make_schedule(config).fit(data, Path(anew))

    calls = {name: partial(train, config) for name, config in runs.items()}
    times = by_turns(calls, rounds)
    rows = []
    for name, found in times.items():
        ratios = [own / plain for own, plain in zip(found, times["FixMatch"], strict=True)]
        rows.append([name, f"{statistics.median(found):.3g}", spread(ratios)])
    return markdown(["run", "seconds", "run / FixMatch's"], rows)


def rank(run: Run, setting: Setting) -> None:
    """Measure the influence of the pool and rank it, as the learned arm does after a round."""
    config = replace(run.config, arm="learned")
    trained = run.result()
    kept = torch.ones(len(setting.data.unlabelled_images), dtype=torch.bool)
    rank_pool(trained, Known(kept), setting.data, config, config.seed)


def throughput_table(settings: list[Setting], rounds: int, folder: Path) -> list[str]:
    """FixMatch's images a second in each setting, and the share of the bare loop."""
    rates, shares = [], []
    for setting in settings:
        run = start_run("fixmatch", setting, folder)
        calls: dict[str, Callable[[], object]] = {
            "bare": bare_loop(run, setting.steps),
            "fixmatch": partial(run.train_steps, setting.steps),
        }
        times = by_turns(calls, rounds)
        images = setting.steps * setting.training.batch_size
        images *= 1 + setting.training.unlabelled_ratio
        rates.append(f"{images / statistics.median(times['fixmatch']):,.0f}")
        ratios = [b / f for b, f in zip(times["bare"], times["fixmatch"], strict=True)]
        shares.append(f"{statistics.median(ratios):.2f}")
    header = ["labelled images in a step", *(str(s.training.batch_size) for s in settings)]
    return markdown(header, [["images a second", *rates], ["bare loop / FixMatch", *shares]])


def option_table(setting: Setting, rounds: int, folder: Path) -> list[str]:
    """FixMatch's step with each option of the configuration, over the step without any.

    The first call, which `torch.compile` warms up in, is told apart.
    """
    plain = replace(setting.training, precision="float32", channels_last=False)
    options = {
        "as it is": plain,
        "channels_last": replace(plain, channels_last=True),
        "bfloat16": replace(plain, precision="bfloat16"),
        "channels_last and bfloat16": replace(plain, channels_last=True, precision="bfloat16"),
        "compile": replace(plain, compile=True),
    }
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for name, training in options.items():
        run = start_run("fixmatch", replace(setting, training=training), folder / name)
        calls[name] = partial(run.train_steps, setting.steps)
        first[name] = seconds_of(calls[name])
    times = by_turns(calls, rounds)
    rows = []
    for name, found in times.items():
        ratios = [own / as_is for own, as_is in zip(found, times["as it is"], strict=True)]
        warming = first[name] - statistics.median(found)
        rows.append([name, spread(ratios), f"{warming:.1f}"])
    return markdown(["option", "step / step as it is", "seconds of warming up"], rows)


def memory_table(settings: list[Setting], folder: Path) -> list[str]:
    """Peak memory of blocks of steps; on a GPU of all that lies there, the pool included."""
    # Here, so that the rest of this module does without pandas.
    from weighmatch.studies.memory import peak_memory

    rows = []
    for setting in settings:
        found = []
        for arm in ("fixmatch", "learned"):
            run = start_run(arm, setting, folder / "memory", interval=setting.updated_steps)
            run.train_steps(setting.updated_steps)
            block = partial(run.train_steps, setting.updated_steps)
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                block()
                peak = torch.cuda.max_memory_allocated()
            else:
                peak = peak_memory(block)
            found.append(f"{peak / 2**20:,.2f}")
            del run, block
        rows.append([setting.name, f"{setting.updated_steps}", *found])
    header = ["problem", "steps in a block", "MiB, FixMatch", "MiB, learned arm with an update"]
    return markdown(header, rows)


def profile_table(setting: Setting, folder: Path, longest: int = 12) -> list[str]:
    """Where a step of FixMatch goes: the operations that take most time themselves."""
    run = start_run("fixmatch", setting, folder / "profile")
    run.train_steps(setting.steps)
    operations = top_operations(
        partial(run.train_steps, setting.steps), run.device, setting.steps, longest
    )
    rows = [[o.name, f"{o.share:.1%}", f"{o.calls:.3g}"] for o in operations]
    return markdown(["operation", "share of the time", "calls a step"], rows)


def many_runs_table(
    setting: Setting, steps: int, workers: list[int], rounds: int, folder: Path
) -> list[str]:
    """As many runs of FixMatch as the largest number of workers, at once and one after another."""
    training = replace(setting.training, steps=steps, snapshots=1, checkpoint_every=FOREVER)
    configs = [
        RunConfig("fixmatch", seed, steps, setting.data.classes, training)
        for seed in range(max(workers))
    ]
    jobs = [Job(f"run {c.seed}", "", c, setting.data, float(steps)) for c in configs]
    times: dict[int, list[float]] = {count: [] for count in workers}
    for turn in range(rounds + 1):
        for count in workers:
            # Workers are kept as long as their number does, and start before they are timed.
            finish_jobs(jobs, folder / f"start {turn} {count}", count)
            seconds = seconds_of(partial(finish_jobs, jobs, folder / f"{turn} {count}", count))
            if turn:
                times[count].append(seconds)
    alone = times[workers[0]]
    rows = [
        [
            f"{count}",
            f"{len(jobs) * steps / statistics.median(found):,.0f}",
            spread([one / own for one, own in zip(alone, found, strict=True)]),
        ]
        for count, found in times.items()
    ]
    return markdown(["runs at a time", "steps a second", f"times as many as {workers[0]}"], rows)
