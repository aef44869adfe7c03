"""The benchmark's own parts; no peer is needed."""

import multiprocessing
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

import pytest
import torch

from benchmarks import peers, workers
from benchmarks.ihvp_peers import (
    GAUSS_NEWTON,
    OURS,
    OURS_BY_DEFAULT,
    accuracy,
    less_accurate,
    memory_verdicts,
    speed,
)
from benchmarks.products import product_costs, product_table
from benchmarks.tables import markdown, spread, verdict
from benchmarks.workers import Timing
from weighmatch.implicit import GaussNewton, flatten


@pytest.fixture(scope="module")
def quadratic():
    return peers.quadratic(size=12, condition=10.0)


@pytest.fixture(scope="module")
def network():
    return peers.damped(peers.mlp((4, 3, 10), batch=6))


class SameThread:
    """A worker without a process."""

    def __init__(self, problem):
        self.problem = problem

    def call(self, function, *arguments):
        return function(self.problem, *arguments)


@pytest.mark.parametrize("method", peers.METHODS)
def test_ours_solves_within_the_products_it_is_given(quadratic, method):
    few = peers.ours(quadratic, method, 4)
    many = peers.ours(quadratic, method, 200)

    exact = quadratic.exact()
    assert few.products == 4
    assert (many.value - exact).norm() < 1e-6 * exact.norm()


def test_gauss_newton_solves_its_own_system(network):
    network = replace(network, damping=1000 * network.damping)
    answer = peers.gauss_newton(network, "CG", 60)

    operator = GaussNewton(network.outputs, network.output_loss, network.params)
    back = operator @ answer.value + network.damping / 1000 * answer.value
    assert (back - network.rhs).norm() < 1e-4 * network.rhs.norm()


def test_exact_solution_is_that_of_the_damped_loss(network):
    params = {name: p.requires_grad_() for name, p in network.params.items()}
    gradient = torch.autograd.grad(
        network.damped_loss(params), list(params.values()), create_graph=True
    )
    pieces = network.tree(network.exact())
    product = torch.autograd.grad(gradient, list(params.values()), pieces)

    torch.testing.assert_close(flatten(dict(enumerate(product))), network.rhs, rtol=1e-3, atol=1e-5)


def test_building_a_problem_leaves_the_allocator_alone():
    with patch("weighmatch.implicit.curvature.keep_freed_memory") as keep:
        peers.mlp((4, 3, 10), batch=2)
        peers.wide_resnet(batch=1)
        keep.assert_not_called()
        peers.damped(peers.mlp((4, 3, 10), batch=2))
        keep.assert_called()


def test_peers_that_are_not_installed_are_left_out(quadratic, capsys):
    def absent(name):
        if name != "weighmatch":
            raise PackageNotFoundError(name)
        return "1"

    with patch.object(peers, "version", absent):
        assert list(peers.installed(peers.SOLVERS)) == ["weighmatch"]
    printed = capsys.readouterr().out
    assert "betty-ml is left out: it is not installed" in printed
    assert "weighmatch" not in printed


@pytest.mark.parametrize(
    ("name", "module"),
    [("betty-ml", "betty"), ("hypergrad", "hypergrad"), ("torchopt", "torchopt")],
)
def test_peers_that_do_not_import_are_left_out(quadratic, capsys, monkeypatch, name, module):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)

    found = peers.usable(quadratic, {OURS: peers.ours, name: peers.SOLVERS[name]})

    assert list(found) == [OURS]
    assert f"{name} is left out of quadratic" in capsys.readouterr().out


def test_accuracy_lists_errors_and_says_who_is_better(quadratic):
    def better(problem, method, products):
        return peers.Answer(problem.exact(), products + 1)

    alone = accuracy(quadratic, {OURS: peers.ours}, [4, 200])
    beaten = accuracy(quadratic, {OURS: peers.ours, "better": better}, [4])

    assert alone[0] == "| method | package | k = 4 | k = 200 |"
    assert alone[-1].endswith("best peer: yes.")
    assert "| CG | better | 0.0e+00 (5) |" in beaten
    assert "no: CG k = 4:" in beaten[-1]
    assert "Neumann k = 4:" in beaten[-1]


def test_less_accurate_overlooks_rounding():
    errors = {OURS: [0.1, 2e-12, 0.3], "a": [0.1 - 1e-9, 1e-15, 0.1], "b": [1.0, 1.0, 0.2]}

    assert less_accurate(errors, [1, 2, 3]) == ["k = 3: 3.0e-01 and a 1.0e-01"]
    assert less_accurate({OURS: [1.0]}, [1]) == []


def test_speed_compares_within_rounds_and_not_with_another_curvature():
    def timings(*seconds):
        return [Timing(gradient=0.5, product=s, products=20) for s in seconds]

    table = speed(
        {
            ("CG", OURS): timings(1.0, 2.0, 3.0),
            ("CG", OURS_BY_DEFAULT): timings(2.0, 2.0, 2.0),
            ("CG", "peer"): timings(2.0, 8.0, 4.0),
            ("CG", GAUSS_NEWTON): timings(1.0, 1.0, 1.0),
        }
    )

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert all(len(row) == len(rows[0]) for row in rows)
    ours, default, peer, other = rows[2:]
    assert ours[2:6] == ["2e+03", "500", "4.00 (2.00–6.00)", "80 (k = 20)"]
    assert ours[6:] == ["", ""]
    assert default[6:] == ["1.00 (0.50–1.50)", ""]
    assert peer[6:] == ["0.50 (0.25–0.75)", "0.50 (0.25–1.00)"]
    assert other[6:] == ["", ""]


def test_speed_without_the_default_allocator_has_no_column_for_it():
    table = speed({("CG", OURS): [Timing(1.0, 1.0, 5)], ("CG", "peer"): [Timing(1.0, 2.0, 5)]})

    assert table[0].endswith("| ours / theirs |")
    assert table[-1].endswith("| 0.50 (0.50–0.50) |")


def test_time_solve_counts_by_the_products_that_were_spent(network):
    def stingy(problem, method, products):
        return peers.Answer(problem.rhs, 2)

    timing = workers.time_solve(network, stingy, "CG", 20)

    assert timing.products == 2
    assert timing.gradient > 0


def test_weight_gradient_agrees_with_double_backward(network):
    errors = workers.weight_gradient_errors(network)

    assert max(errors) < 1e-5
    assert min(workers.time_weight_gradients(network)) > 0


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        for _ in range(3):
            tensor = torch.ones(1000)
            del tensor
        kept = [torch.ones(1000) for _ in range(2)]
        kept.clear()

    assert 8000 <= workers.peak_memory(call) < 8100


def test_memory_verdicts_see_a_multiple_that_grows():
    flat = {"CG": [8.0, 8.1], "Nystrom, rank 10": [100, 101], "Nystrom, rank 50": [500, 501]}

    assert memory_verdicts(flat)[0].endswith("yes.")
    assert "10.0 vectors" in memory_verdicts(flat)[-1]
    assert memory_verdicts({**flat, "CG": [8.0, 16.0]})[0].endswith("no: CG: 2.00 ×.")


@contextmanager
def served(memory):
    here, there = multiprocessing.Pipe()
    thread = threading.Thread(target=workers.serve, args=(there, peers.ours, memory))
    thread.start()
    try:
        yield here
    finally:
        here.close()
        thread.join()


def test_a_worker_builds_answers_and_hands_back_errors(network):
    with served("default") as connection:

        def call(function, *arguments):
            connection.send((function, arguments))
            return connection.recv()

        build = partial(peers.mlp, (4, 3, 10), batch=6)
        assert call(workers._constants, build, network.damping, network.step) is None
        assert call(workers.time_solve, peers.ours, "CG", 3).products == 3
        assert isinstance(call(workers.time_solve, peers.ours, "CG", 1), ValueError)
        assert 1 < call(workers.solve_memory, None) < 100


@pytest.mark.parametrize(("memory", "calls"), [("own", 1), ("default", 0), ("kept", 2)])
def test_a_worker_sets_the_allocator_as_it_is_told(memory, calls):
    with (
        patch("weighmatch.implicit.curvature.keep_freed_memory") as ours,
        patch.object(workers, "keep_freed_memory") as told,
        served(memory),
    ):
        pass

    assert ours.call_count + told.call_count == calls


def test_markdown_and_its_cells():
    assert markdown(["a", "b"], [["1", ""]]) == ["| a | b |", "| --- | --- |", "| 1 |  |"]
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"
    assert spread([]) == ""
    assert verdict("It holds", []) == "It holds: yes."
    assert verdict("It holds", ["here", "there"]) == "It holds: no: here; there."


def test_every_way_to_multiply_is_timed(network):
    costs = product_costs(network, rounds=1)
    assert len(costs) == 7
    assert all(c.product > 0 and c.once > 0 for c in costs.values())
    table = product_table(costs)
    assert len(table) == 2 + len(costs)
    assert "Hessian, 16 columns" in table[5]
