"""One run that several processes train together, in double precision, against one process."""

import multiprocessing
import os
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.semisup.helpers import fit_until_killed
from weighmatch.checks import ToldError
from weighmatch.engine_config import EngineConfig
from weighmatch.semisup import RunsConfig, TrainingSet
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.group import (
    ALONE,
    DisagreementError,
    GroupError,
    Processes,
    TooFewError,
)
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Standardise
from weighmatch.semisup.parts.state_file import leaves, read_state
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.parts.views import StoredViews
from weighmatch.semisup.training import jobs, ranking
from weighmatch.semisup.training.batches import Batches
from weighmatch.semisup.training.deadline import Deadline
from weighmatch.semisup.training.dividing import LAUNCHED, require_divisible
from weighmatch.semisup.training.jobs import Job, _fit, finish_jobs, kept_steps
from weighmatch.semisup.training.loop import CHECKPOINT, Run
from weighmatch.semisup.training.numerics import algorithms, precision
from weighmatch.semisup.training.processes import Team, together
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.semisup.weightings.inlier import InlierFilter

TOLERANCE = 1e-6


class Member(Processes):
    """A member of a group of which no other process is there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def assert_close(a, b, where=""):
    """Assert that two nested containers hold the same, numbers to `TOLERANCE`, times aside."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if "seconds" not in str(key):
                assert_close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}.{number}")
    elif isinstance(a, torch.Tensor) and a.is_floating_point():
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=lambda text: where + text)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=TOLERANCE, rel=0), where
    else:
        assert a == b, where


def hypergradient(job, folder, group=ALONE):
    """After some steps: the solution v, influences, and the hypergradient of the weights."""
    with precision("float64"):
        run = Run(replace(job.config, group=group), job.data, folder)
        run.train_steps(12)
        meter, network = run.weighting.meter, run.weighting.network
        views = meter.draw_views(run.classifier)
        solution = meter.solve(run.classifier, views)
        influence = meter.influence(run.classifier, views, solution.value)
        images = run.batches.views.plain(run.batches.pool[views.indices])
        weights = mean_one(torch.sigmoid(network(images)))
        gradient = torch.autograd.grad(-(influence * weights).mean(), list(network.parameters()))
    return {"v": solution.value, "influence": influence, "hypergradient": gradient}


def doubled(name, config, data):
    """A job that is trained in double precision."""
    training = replace(config.training, precision="float64")
    return Job(name, "seed_0", replace(config, training=training), data, 1.0)


def assert_all_are_one(planned, tmp_path, more=lambda team: None, *, processes=2, device="cpu"):
    """Assert that several processes end where one does, in each job; what a folder holds counts."""
    for job in planned:
        _fit(job, tmp_path / "one", ALONE)
    with together(processes, device) as team:
        for job in planned:
            team.also(_fit, job, tmp_path / "all")
            _fit(job, tmp_path / "all", team.group)
        more(team)
    for job in planned:
        assert_equal_files(job, tmp_path / "one", tmp_path / "all")


def assert_equal_files(job, one, other):
    """Assert that a job has ended at the same numbers in both folders."""
    for name in ("run.pt", CHECKPOINT):
        expected, found = (read_state(job.folder(folder) / name) for folder in (one, other))
        assert_close(expected, found, job.name)


@pytest.mark.integration
def test_two_processes_train_what_one_does(training_set, run_config, tmp_path):
    learned = doubled("learned", run_config(steps=50, distribution_alignment=True), training_set)
    rounds = doubled("rounds", run_config(steps=50, schedule="rounds", rounds=2), training_set)
    sharded = doubled("sharded", run_config(steps=50, pool_memory="sharded"), training_set)
    # What one process has begun two go on with.
    resumed = doubled("resumed", run_config(steps=120), training_set)
    folder = resumed.folder(tmp_path / "all")
    fit_until_killed(make_schedule(resumed.config), training_set, folder, 100)
    assert kept_steps(resumed, tmp_path / "all") == 100
    found = {}

    def measure(team):
        team.also(hypergradient, learned, tmp_path / "b")
        found.update(hypergradient(learned, tmp_path / "b", team.group))

    assert_all_are_one([learned, rounds, sharded, resumed], tmp_path, measure)
    expected = hypergradient(learned, tmp_path / "a")
    assert all(bool(tensor.any()) for tensor in expected["hypergradient"])
    assert_close(expected, found)


@pytest.mark.slow
def test_two_processes_train_other_arms_as_one_does(training_set, run_config, tmp_path):
    held_out = {"weights": "soft", "outer_labels": "held_out"}
    configs = {
        "fixmatch": run_config("fixmatch", steps=50),
        "soft": run_config(steps=50, weighting=held_out, batch_size=5, unlabelled_ratio=3),
        "stages": run_config(steps=50, schedule="two_stages"),
        **{
            arm: run_config(arm, steps=50)
            for arm in ("supervised", "softmatch", "energy", "ds3l", "pu", "inlier", "free")
        },
    }
    planned = [doubled(name, config, training_set) for name, config in configs.items()]
    planned += on_features(run_config)
    training = [replace(job.config.training, pool_memory="sharded") for job in planned]
    planned += [
        replace(job, name=f"{job.name}-sharded", config=replace(job.config, training=each))
        for job, each in zip(planned, training, strict=True)
    ]
    assert_all_are_one(planned, tmp_path)


@pytest.mark.slow
def test_three_processes_train_what_one_does(training_set, run_config, tmp_path):
    # No size of a batch is a multiple of three.
    sizes = {"influence": {"outer_batch": 13, "batch": 11}, "batch_size": 7}
    online = run_config(steps=20, distribution_alignment=True, **sizes)
    rounds = run_config(steps=20, schedule="rounds", rounds=2, **sizes)
    planned = [doubled("online", online, training_set), doubled("rounds", rounds, training_set)]
    assert_all_are_one(planned, tmp_path, processes=3)


@pytest.mark.slow
def test_fewer_processes_go_on_where_more_were_stopped(training_set, run_config, tmp_path):
    job = doubled("resumed", run_config(steps=230), training_set)
    _fit(job, tmp_path / "one", ALONE)
    for processes, last in ((3, 100), (2, 200)):
        with together(processes, "cpu") as team:
            schedule = make_schedule(replace(job.config, group=team.group))
            team.also(_fit, job, tmp_path / "all")
            fit_until_killed(schedule, training_set, job.folder(tmp_path / "all"), last)
        assert kept_steps(job, tmp_path / "all") == last
    _fit(job, tmp_path / "all", ALONE)
    assert_equal_files(job, tmp_path / "one", tmp_path / "all")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_two_processes_with_a_gpu_train_what_one_does(training_set, run_config, tmp_path):
    """Where there is one GPU they share it."""
    online = run_config(steps=50, device="cuda")
    rounds = run_config(steps=50, schedule="rounds", rounds=2, device="cuda")
    sharded = run_config(steps=50, device="cuda", pool_memory="sharded")
    configs = {"online": online, "rounds": rounds, "sharded": sharded}
    planned = [doubled(name, config, training_set) for name, config in configs.items()]
    assert_all_are_one(planned, tmp_path, device="cuda")


def on_features(run_config):
    """Jobs whose classifier is a head on stored features."""
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 3
    mine, theirs = (rng.normal(size=(n, 6, 8)) for n in (12, 40))
    mine += 2 * labels[:, None, None] * np.eye(8)[0]
    data = TrainingSet(
        mine.astype(np.float16), labels, theirs.astype(np.float16), image_shape=(3, 64, 64)
    )
    settings = {
        "network": "efficientnet_lite0",
        "weights": "packaged",
        "features": {"weak_views": 2, "strong_views": 3},
    }
    return [
        doubled("frozen", run_config(steps=50, **settings), data),
        doubled(
            "frozen-rounds", run_config(steps=50, schedule="rounds", rounds=2, **settings), data
        ),
    ]


def train_by_two(job, folder, progress):
    with together(2, "cpu") as team:
        team.also(_fit, job, folder)
        _fit(job, folder, team.group, progress)


def hold_a_part(job, group):
    """Fail unless this process holds half of the images, and gives out all that it is asked for."""
    for kept in (np.arange(job.data.pool_size) > -1, np.arange(job.data.pool_size) % 3 > 0):
        data = job.data.select(kept)
        store = data.store(torch.device("cpu"), "sharded", group)
        assert abs(store.held - len(store) / 2) < 1
        # Each process asks for others, and for other numbers of them.
        asked = torch.arange(len(store) - 1, -1, -1 - group.rank).repeat(2)
        assert torch.equal(store[asked], torch.from_numpy(data.pool_images(asked.numpy())))
        assert len(store[asked[:0]]) == 0
        if data.has_features:
            views = asked % store.shape[1]
            expected = data.pool_images(asked.numpy())[np.arange(len(asked)), views.numpy()]
            assert torch.equal(store.view(asked, views), torch.from_numpy(expected))


@pytest.mark.integration
def test_processes_share_out_a_pool_and_give_one_another_its_images(training_set, run_config):
    images = Job("images", "seed_0", run_config(), training_set, 1.0)
    with together(2, "cpu") as team:
        for job in (images, on_features(run_config)[0]):
            team.also(hold_a_part, job)
            hold_a_part(job, team.group)
        team.also(disagree)
        with pytest.raises(DisagreementError):  # all have come so far
            disagree(team.group)


def disagree(group):
    group.require_same(lambda: [1, torch.ones(2)])
    group.require_same(lambda: [1, torch.full((2,), 1.0 + group.rank * 1e-6)])


@pytest.mark.integration
def test_processes_with_different_numbers_end():
    with pytest.raises(DisagreementError, match=r"have come to different numbers; train on mach"):
        call_in_two(disagree)


def call_in_two(function, *arguments):
    with together(2, "cpu") as team:
        team.also(function, *arguments)
        function(*arguments, team.group)


def fit_with_noise(jobs, folder, group):
    """Fit in processes of which each comes to other numbers where it computes whole by itself."""
    noise = torch.Generator().manual_seed(group.rank)

    def noisy(function):
        def changed(*arguments):
            found = function(*arguments)
            return found + group.rank * torch.randn(found.shape, generator=noise)

        return changed

    def noisy_fit(self, *arguments, **named):
        fit(self, *arguments, **named)
        self.location.add_(group.rank)

    def noisy_update(self, classifier):
        log = update(self, classifier)
        for part in leaves(self.state_dict()):
            if isinstance(part, torch.Tensor):
                part.add_(group.rank)
        return log

    fit, update = Standardise.fit, InlierFilter.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_augmented_features", noisy(ranking._augmented_features))
        patch.setattr(ranking, "otsu_cut", lambda scores: float(group.rank))
        patch.setattr(Standardise, "fit", noisy_fit)
        patch.setattr(InlierFilter, "update", noisy_update)
        for job in jobs:
            run = make_schedule(replace(job.config, group=group)).fit(job.data, folder / job.name)
            state = run.to_state()
            group.require_same(lambda state=state: [state["pool"], state["classifier"]])


@pytest.mark.integration
def test_what_each_process_fits_by_itself_is_that_of_the_first(training_set, run_config, tmp_path):
    rounds = {"schedule": "rounds", "rounds": 2}
    configs = {
        "rounds": run_config(steps=40, **rounds),
        "stages": run_config("energy", steps=20, schedule="two_stages"),
        "inlier": run_config("inlier", steps=20),
    }
    planned = [Job(name, "seed_0", config, training_set, 1.0) for name, config in configs.items()]
    planned.append(on_features(run_config)[0])
    call_in_two(fit_with_noise, planned, tmp_path)
    # Both of them found the same at the end of each run.
    assert all((tmp_path / job.name / "run.pt").exists() for job in planned)


def test_several_processes_use_repeatable_algorithms_where_there_are_any():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        )

    before = settings()
    with algorithms(False, Member(0, 2)):
        assert settings() == (True, True, False)
        with algorithms(True, Member(0, 2)):
            assert settings() == (True, False, False)
        assert settings() == (True, True, False)
    assert settings() == before
    with algorithms(False):
        assert settings()[::2] == (False, True)


def train_other_pools(job, folder, group):
    data = job.data.select(np.arange(job.data.pool_size) > group.rank)
    Run(replace(job.config, group=group), data, folder)


def lose_a_pseudo_label(job, folder, group):
    run = Run(replace(job.config, group=group), job.data, folder)
    run.train_steps(10)
    run.pool_labels = torch.full((job.data.pool_size,), group.rank)
    run.save()


@pytest.mark.integration
@pytest.mark.parametrize("function", [train_other_pools, lose_a_pseudo_label])
def test_processes_that_hold_something_else_end(function, training_set, run_config, tmp_path):
    job = Job("apart", "seed_0", run_config(steps=20), training_set, 1.0)
    with pytest.raises(DisagreementError):
        call_in_two(function, job, tmp_path)


@pytest.mark.integration
def test_a_killed_process_ends_all_and_one_process_goes_on(training_set, run_config, tmp_path):
    job = doubled("killed", run_config(steps=110), training_set)
    _fit(job, tmp_path / "whole", ALONE)
    before = set(multiprocessing.active_children())

    def kill(steps):
        if steps:
            (child,) = set(multiprocessing.active_children()) - before
            os.kill(child.pid, signal.SIGKILL)

    told = "one of the 2 processes .* ended by SIGKILL.*goes on from its last checkpoint"
    with pytest.raises(GroupError, match=told):
        train_by_two(job, tmp_path / "two", kill)
    assert set(multiprocessing.active_children()) <= before
    assert kept_steps(job, tmp_path / "two") == 100
    finish_jobs([job], tmp_path / "two", 1)
    assert_equal_files(job, tmp_path / "whole", tmp_path / "two")


@pytest.mark.parametrize("frozen", [False, True])
def test_the_parts_of_a_batch_are_the_batch(frozen, training_set, run_config):
    training = run_config(batch_size=5).training
    if frozen:
        rng = np.random.default_rng(0)
        labelled, pool = (
            rng.random((n, 6, 4)).astype(np.float16) for n in (12, training_set.pool_size)
        )
        views = StoredViews(2, 3)
    else:
        labelled, pool = training_set.labelled_images, training_set.unlabelled_images
        views = Augmentation(training.augmentation)

    def draw(group):
        return Batches(
            torch.from_numpy(labelled),
            torch.from_numpy(training_set.labels),
            ImageStore(pool, torch.device("cpu")),
            training,
            views,
            Streams(0),
            True,
            group,
        ).draw(3)

    parts = [draw(Member(rank, 3)) for rank in range(3)]
    for step, whole in enumerate(draw(ALONE)):
        strong = whole.images[5:]
        for rank, batches in enumerate(parts):
            part = batches[step]
            count = len(part.labels)
            assert torch.equal(part.labels, whole.labels[rank::3])
            assert torch.equal(part.images[:count], whole.images[:5][rank::3])
            assert torch.equal(part.images[count:], strong[rank::3])
            assert torch.equal(part.weak, whole.weak[rank::3])
            assert torch.equal(part.indices, whole.indices[rank::3])


def test_a_batch_that_is_too_small_to_divide_is_refused():
    assert [Member(rank, 3).share(5) for rank in range(3)] == [2, 2, 1]
    with pytest.raises(TooFewError, match=r"batch of 2 images.*3 processes; set runs\.processes"):
        Member(0, 3).rows(2)


def test_what_several_processes_cannot_train_is_refused_before(
    training_set, run_config, tmp_path, monkeypatch
):
    team = Team()
    team.group = Member(0, 2)
    monkeypatch.setattr(jobs, "together", lambda processes, device: nullcontext(team))
    job = doubled("late", run_config(), training_set)
    with pytest.raises(ToldError, match=r"leave out runs\.time_limit, or start one"):
        finish_jobs([job], tmp_path, 1, deadline=Deadline(1.0, 1.0), processes=2)
    small = replace(job, config=run_config(influence={"curvature_batch": 1}))
    with pytest.raises(ToldError, match=r"influence\.curvature_batch 1 cannot .* over 2 p"):
        finish_jobs([small], tmp_path, 1, processes=2)
    require_divisible(2, small.config.training, [("fixmatch", "online")], limited=False)
    tiny = replace(job, data=training_set.select(np.arange(training_set.pool_size) == 3))
    with pytest.raises(ToldError, match=r"pool of 1 images cannot be divided over 2 processes"):
        finish_jobs([job, tiny], tmp_path, 1, processes=2)
    monkeypatch.setenv(LAUNCHED, "x")
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(ToldError, match=r"training\.batch_size 6 cannot be divided over 9"):
        finish_jobs([job], tmp_path, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ToldError, match=r"torchrun .* leave out runs\.engine"):
        finish_jobs([job], tmp_path, 1, engine=EngineConfig(engine="ray"), processes=2)
    with pytest.raises(ValueError, match=r"runs\.processes must be an integer of at least 1"):
        RunsConfig(processes=0)
