"""The simulation of a cluster, and the cost model beside it."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scale import (
    Cluster,
    Machine,
    Pile,
    Training,
    pile_seconds,
    say,
    simulate,
    whole_seconds,
)

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


def test_the_longest_part_is_the_time_of_a_pile():
    gpu, cores = Machine(16, 1), Machine(16)
    for machine, whole in ((gpu, max), (cores, lambda parts: max(sum(parts[:2]), parts[2]))):
        parts = pile_seconds(Pile(1e6, 2, stored=True), machine, 3)
        assert whole_seconds(parts, machine) == whole(list(parts.values()))
    one, three = (pile_seconds(Pile(1e6), gpu, count) for count in (1, 3))
    assert one["decoding"] == pytest.approx(3 * three["decoding"])
    assert one["gathering"] == three["gathering"]


def test_only_rankings_grow_with_the_pool():
    small, large = Training().costs(1e6), Training().costs(1e8)
    assert large["ranking"] == pytest.approx(100 * small["ranking"])
    assert large["training"] == small["training"]
    assert large["arbiter"] == small["arbiter"]


def test_times_are_said_in_units_that_people_use():
    assert [say(x) for x in (1.0, 200.0, 8000.0, 1e6)] == ["1.0 s", "3.3 min", "2.2 h", "11.6 days"]
