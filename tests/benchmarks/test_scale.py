"""The simulation of a cluster, and the cost model beside it."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scale import (
    Machine,
    Pile,
    Together,
    Training,
    pile_seconds,
    say,
    whole_seconds,
)
from benchmarks.simulation import Cluster, simulate

QUIET = Cluster(nodes=2, slots=2, start=5.0)


def test_tasks_fill_the_slots_in_waves():
    found = simulate([10.0] * 8, QUIET)
    assert found.seconds == pytest.approx(5 + 2 * 10)
    assert found.busy == pytest.approx(80 / (4 * 25))
    assert (found.lost, found.deaths) == (0.0, 0)


def test_one_scheduler_hands_out_one_task_at_a_time():
    slow = replace(QUIET, start=0.0, dispatch=3.0)
    assert simulate([10.0] * 4, slow).seconds == pytest.approx(4 * 3 + 10)


def test_a_death_costs_the_work_since_the_last_checkpoint():
    base = replace(QUIET, start=0.0, detect=2.0, repair=1.0)
    whole = simulate([100.0] * 4, base, deaths={0: 50.0})
    assert whole.seconds == pytest.approx(50 + 2 + 100)
    assert whole.lost == pytest.approx(100.0)
    saved = simulate([100.0] * 4, replace(base, checkpoint=20.0), deaths={0: 50.0})
    assert saved.seconds == pytest.approx(50 + 2 + 60)
    assert saved.lost == pytest.approx(20.0)
    assert whole.deaths == saved.deaths == 1


def test_a_node_that_is_not_repaired_leaves_its_tasks_to_the_others():
    found = simulate([10.0] * 4, replace(QUIET, start=0.0), deaths={1: 4.0})
    assert found.seconds == pytest.approx(20.0)
    with pytest.raises(RuntimeError):
        simulate([10.0] * 4, QUIET, deaths={0: 6.0, 1: 6.0})


def test_failures_of_a_lifetime_are_those_of_the_seed():
    frail = replace(QUIET, lifetime=40.0, repair=5.0, spread=0.3, checkpoint=5.0)
    first, again, other = (simulate([20.0] * 12, frail, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.deaths > 0
    assert first.seconds > simulate([20.0] * 12, replace(frail, lifetime=np.inf), 0).seconds


def test_machines_share_what_is_not_done_by_one_of_them():
    gpu, cores = Machine(16, 1), Machine(16)
    one, many = (pile_seconds(Pile(1e6), gpu, count) for count in (1, 3000))
    assert one["decoding"] == pytest.approx(3000 * many["decoding"])
    assert one["merging"] == many["merging"]
    between = whole_seconds(one, gpu) - one["listing"] - one["merging"]
    assert between == pytest.approx(one["decoding"])
    assert one["decoding"] > one["features"]
    between = whole_seconds(many, gpu) - many["listing"] - many["merging"]
    assert between == pytest.approx(many["handing out"])
    slow = pile_seconds(Pile(1e6, 2, stored=True), cores, 1)
    between = whole_seconds(slow, cores) - slow["listing"]
    assert between == pytest.approx(slow["decoding"] + slow["features"])


def test_only_the_gradients_of_a_run_are_divided_by_its_gpus():
    one, eight, many = (Together(gpus) for gpus in (1, 8, 800))
    assert one.pass_seconds(1e8)["sums"] == one.sum_seconds == 0
    assert one.pass_seconds(1e8)["gradients"] == 8 * eight.pass_seconds(1e8)["gradients"]
    assert eight.arbiter_seconds()["sums"] < many.arbiter_seconds()["sums"]
    assert one.ranking_seconds(1e8) == pytest.approx(800 * many.ranking_seconds(1e8))


def test_only_rankings_grow_with_the_pool():
    small, large = Training().costs(1e6), Training().costs(1e8)
    assert large["ranking"] == pytest.approx(100 * small["ranking"])
    assert large["training"] == small["training"]
    assert large["arbiter"] == small["arbiter"]


def test_times_are_said_in_units_that_people_use():
    assert say(0.0) == "0 s"
    assert [say(x) for x in (0.01, 1.0, 200.0, 8000.0, 1e6)] == [
        "10.0 ms",
        "1.0 s",
        "3.3 min",
        "2.2 h",
        "11.6 days",
    ]
