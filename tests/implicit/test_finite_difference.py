"""DARTS and SAMA against closed forms, and what the difference loses in single precision."""

import math

import pytest
import torch

from tests.implicit.problems import draw, relative, spd
from weighmatch.implicit import (
    Hessian,
    Identity,
    darts_gradient,
    flatten,
    implicit_gradient,
    sama_gradient,
)

MATRIX, TARGET = spd(torch.linspace(1, 3, 6))
PARAMS = {"a": draw(2, 2, seed=1), "b": draw(2, seed=2)}
HYPER = {"weights": draw(6, seed=3), "scale": torch.tensor(0.5, dtype=torch.float64)}


def bilinear(params, hyper):
    """Its mixed derivative is constant in θ, so that any difference finds it."""
    x = flatten(params)
    return 0.5 * x @ MATRIX @ x - hyper["weights"] @ (MATRIX @ x) + hyper["scale"] * x.sum()


def curved(params, hyper):
    x = flatten(params)
    return bilinear(params, hyper) + (hyper["weights"] * x.pow(3)).sum()


def outer(params, hyper):
    return (flatten(params) - TARGET).square().sum() + 0.1 * hyper["weights"].square().sum()


def outer_gradient():
    return 2 * (flatten(PARAMS) - TARGET)


def test_darts_is_the_direct_term_minus_the_mixed_derivative_times_the_step():
    found = darts_gradient(bilinear, outer, PARAMS, HYPER, learning_rate=0.3)
    v = 0.3 * outer_gradient()
    torch.testing.assert_close(found["weights"], 0.2 * HYPER["weights"] + MATRIX @ v)
    torch.testing.assert_close(found["scale"], -v.sum())


def test_darts_is_the_identitys_hypergradient_scaled_up_to_the_square_of_its_radius():
    exact, _ = implicit_gradient(curved, outer, PARAMS, HYPER, Identity(shorten=False))
    direct = {"weights": 0.2 * HYPER["weights"], "scale": torch.tensor(0.0).double()}
    errors = []
    for radius in (0.4, 0.2, 0.1):
        found = darts_gradient(curved, outer, PARAMS, HYPER, learning_rate=0.3, radius=radius)
        scaled = {k: (found[k] - direct[k]) / 0.3 for k in found}
        expected = {k: exact[k] - direct[k] for k in exact}
        errors.append(relative(flatten(scaled), flatten(expected)))
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.01)


def test_darts_is_the_derivative_of_one_step():
    """At a point where the outer gradient hardly changes over the step."""

    def after_a_step(hyper):
        gradient = torch.func.grad(lambda x: bilinear({"x": x}, hyper))(flatten(PARAMS))
        return outer({"x": flatten(PARAMS) - 1e-6 * gradient}, hyper)

    exact = torch.func.grad(after_a_step)(HYPER)
    found = darts_gradient(bilinear, outer, PARAMS, HYPER, learning_rate=1e-6)
    torch.testing.assert_close(found["scale"], exact["scale"], rtol=1e-4, atol=0)


def test_sama_scales_the_outer_gradient_as_adam_scales_a_step():
    moment = {"b": draw(2, seed=5).square(), "a": draw(2, 2, seed=4).square()}  # in any order
    found = sama_gradient(
        bilinear, outer, PARAMS, HYPER, learning_rate=0.3, second_moment=moment, eps=0.1
    )
    m = torch.cat([moment["a"].flatten(), moment["b"]])
    v = 0.3 * outer_gradient() / (m.sqrt() + 0.1)
    torch.testing.assert_close(found["weights"], 0.2 * HYPER["weights"] + MATRIX @ v)
    torch.testing.assert_close(found["scale"], -v.sum())


def test_sama_with_moments_of_one_is_darts():
    ones = {k: torch.ones_like(p) for k, p in PARAMS.items()}
    sama = sama_gradient(
        curved, outer, PARAMS, HYPER, learning_rate=0.3, second_moment=ones, eps=1e-12
    )
    darts = darts_gradient(curved, outer, PARAMS, HYPER, learning_rate=0.3)
    torch.testing.assert_close(flatten({k: sama[k] for k in HYPER}), flatten(darts))


def test_single_precision_loses_half_of_the_digits_and_more_with_a_small_radius():
    single = {k: p.float() for k, p in PARAMS.items()}
    hyper = {k: p.float() for k, p in HYPER.items()}

    def inner(params, hyper):
        x = flatten(params)
        return 0.5 * x @ MATRIX.to(x) @ x - hyper["weights"] @ (MATRIX.to(x) @ x)

    def fit(params):
        return (flatten(params) - TARGET.to(params["a"])).square().sum()

    exact, _ = implicit_gradient(inner, fit, PARAMS, HYPER, Identity(shorten=False))
    errors = []
    for radius in (1e-2, 1e-4, 1e-6):
        found = darts_gradient(inner, fit, single, hyper, learning_rate=1.0, radius=radius)
        errors.append(relative(found["weights"], exact["weights"]))
        # In double precision the same radius does no harm.
        double = darts_gradient(inner, fit, PARAMS, HYPER, learning_rate=1.0, radius=radius)
        assert relative(double["weights"], exact["weights"]) < 1e-8
    assert 1e-6 < errors[0] < 1e-3 < errors[1] * 10
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] > 1e-2
    # The mixed derivative itself keeps single precision.
    curvature = lambda loss, theta: Hessian(loss, theta)  # noqa: E731
    whole, _ = implicit_gradient(
        inner, fit, single, hyper, Identity(shorten=False), curvature=curvature
    )
    assert relative(whole["weights"], exact["weights"]) < 1e-6


def test_without_an_outer_gradient_only_the_direct_term_is_left():
    found = darts_gradient(
        bilinear,
        lambda params, hyper: 3 * hyper["scale"] + 0 * flatten(params).sum(),
        PARAMS,
        HYPER,
        learning_rate=0.1,
    )
    assert float(found["scale"]) == 3
    assert torch.equal(found["weights"], torch.zeros(6, dtype=torch.float64))


def test_bad_settings_are_refused():
    moment = {k: torch.ones_like(p) for k, p in PARAMS.items()}
    for bad in (0.0, -1.0, math.nan):
        for name in ("learning_rate", "radius"):
            with pytest.raises(ValueError, match=name):
                darts_gradient(bilinear, outer, PARAMS, HYPER, **{"learning_rate": 0.1, name: bad})
        for name in ("learning_rate", "radius", "eps"):
            settings = {"learning_rate": 0.1, "second_moment": moment, name: bad}
            with pytest.raises(ValueError, match=name):
                sama_gradient(bilinear, outer, PARAMS, HYPER, **settings)
    with pytest.raises(ValueError, match="second_moment lacks b"):
        sama_gradient(
            bilinear, outer, PARAMS, HYPER, learning_rate=0.1, second_moment={"a": moment["a"]}
        )
