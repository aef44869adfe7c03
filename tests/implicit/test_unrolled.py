"""Differentiation through training against training again."""

import itertools

import pytest
import torch

from tests.implicit.problems import draw, spd
from weighmatch.implicit import Exact, implicit_gradient, unrolled_gradient

MATRIX, TARGET = spd(torch.linspace(1, 3, 4))
HYPER = {"decay": torch.tensor(0.3, dtype=torch.float64), "pull": draw(4, seed=1)}
INIT = {"x": draw(4, seed=2)}


def inner(params, hyper):
    x = params["x"]
    fit = 0.5 * x @ MATRIX @ x - x @ (TARGET + hyper["pull"])
    return fit + 0.5 * hyper["decay"] * x.square().sum() + 0.1 * x.pow(4).sum()


def outer(params, hyper):
    return (params["x"] - 1).square().sum() + 0.2 * hyper["pull"].square().sum()


def descend(params, hyper):
    """Differentiates the inner loss itself."""
    (gradient,) = torch.autograd.grad(inner(params, hyper), [params["x"]], create_graph=True)
    return {"x": params["x"] - 0.1 * gradient}


def heavy_ball(params, hyper, t):
    """Momentum is a parameter like others; the rate falls with the step."""
    gradient = torch.func.grad(lambda x: inner({"x": x}, hyper))(params["x"])
    momentum = 0.8 * params["m"] + gradient
    return {"x": params["x"] - 0.1 / (1 + 0.1 * t) * momentum, "m": momentum}


def trained(step, init, hyper, steps, counted):
    params = {k: p.clone().requires_grad_() for k, p in init.items()}
    for t in range(steps):
        params = step(params, hyper, t) if counted else step(params, hyper)
        params = {k: p.detach().requires_grad_() for k, p in params.items()}
    return params


def finite_differences(value, step=1e-5):
    gradients = {}
    for name, entry in HYPER.items():
        gradient = torch.zeros_like(entry).flatten()
        for k in range(entry.numel()):
            moved = []
            for sign in (1, -1):
                shifted = entry.clone().reshape(-1)
                shifted[k] += sign * step
                moved.append(value({**HYPER, name: shifted.view_as(entry)}).item())
            gradient[k] = (moved[0] - moved[1]) / (2 * step)
        gradients[name] = gradient.view_as(entry)
    return gradients


def assert_same(found, expected, rtol=1e-6):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_it_is_the_derivative_of_training_again(steps):
    expected = finite_differences(
        lambda h: outer(trained(descend, INIT, h, steps, counted=False), h)
    )
    assert_same(unrolled_gradient(descend, INIT, HYPER, outer, steps), expected)


@pytest.mark.parametrize("steps", [1, 6])
def test_momentum_and_a_schedule_are_differentiated_through(steps):
    init = {**INIT, "m": torch.zeros(4, dtype=torch.float64)}
    expected = finite_differences(
        lambda h: outer(trained(heavy_ball, init, h, steps, counted=True), h)
    )
    assert_same(unrolled_gradient(heavy_ball, init, HYPER, outer, steps), expected)


@pytest.mark.parametrize("truncation", [0, 1, 3, 7, 50])
def test_truncation_differentiates_the_last_steps_alone(truncation):
    steps = 7
    first = max(0, steps - truncation)
    start = trained(descend, INIT, HYPER, first, counted=False)
    start = {k: p.detach() for k, p in start.items()}
    expected = finite_differences(
        lambda h: outer(trained(descend, start, h, steps - first, counted=False), h)
    )
    found = unrolled_gradient(descend, INIT, HYPER, outer, steps, truncation=truncation)
    assert_same(found, expected)


def test_the_step_number_is_that_of_the_whole_run_under_truncation():
    seen = []

    def step(params, hyper, t):
        seen.append(t)
        return {"x": params["x"] * hyper["decay"]}

    unrolled_gradient(step, INIT, HYPER, outer, 5, truncation=2)
    assert seen == [0, 1, 2, 3, 4]


def test_it_nears_the_implicit_gradient_as_training_converges():
    solution = trained(descend, INIT, HYPER, 400, counted=False)
    solution = {k: p.detach() for k, p in solution.items()}
    implicit, _ = implicit_gradient(inner, outer, solution, HYPER, Exact())
    distances = []
    for steps in (5, 10, 20, 40, 120):
        found = unrolled_gradient(descend, INIT, HYPER, outer, steps)
        distances.append(float((found["pull"] - implicit["pull"]).norm()))
    assert all(after < before for before, after in itertools.pairwise(distances))
    assert distances[-1] < 1e-6
    # From the solution itself, each further step that is looked through adds less.
    short = unrolled_gradient(descend, solution, HYPER, outer, 160, truncation=120)
    assert_same(short, implicit)


def test_the_outer_loss_may_be_blind_to_hyperparameters_and_they_may_be_a_list():
    hyper = [HYPER["decay"], HYPER["pull"]]

    def step(params, hyper):
        return descend(params, {"decay": hyper[0], "pull": hyper[1]})

    found = unrolled_gradient(step, INIT, hyper, lambda p: p["x"].sum(), 3)
    expected = finite_differences(lambda h: trained(descend, INIT, h, 3, counted=False)["x"].sum())
    assert isinstance(found, list)
    assert_same(dict(zip(HYPER, found, strict=True)), expected)
    nothing = unrolled_gradient(lambda p, h: p, INIT, hyper, lambda p: p["x"].sum(), 3)
    assert all(torch.equal(g, torch.zeros_like(h)) for g, h in zip(nothing, hyper, strict=True))


def test_arguments_stay_as_they_are():
    before = {k: p.clone() for k, p in {**INIT, **HYPER}.items()}
    found = unrolled_gradient(descend, INIT, HYPER, outer, 3)
    for name, p in {**INIT, **HYPER}.items():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
    assert not any(g.requires_grad for g in found.values())


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="steps"):
        unrolled_gradient(descend, INIT, HYPER, outer, -1)
    with pytest.raises(ValueError, match="truncation"):
        unrolled_gradient(descend, INIT, HYPER, outer, 1, truncation=-1)
