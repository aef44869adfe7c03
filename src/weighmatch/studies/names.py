"""What parameters of the meta-learning study may name, and sizes that their checks need.

Without torch: Kedro reads parameters before any work starts.
"""

from pathlib import Path
from typing import Any

# A problem is a module of that package and has its name.
PROBLEM_NAMES = tuple(
    sorted(
        path.stem
        for path in (Path(__file__).parent / "problems").glob("*.py")
        if path.stem not in ("__init__", "contract")
    )
)
TEST_IMAGES = 500
# The contaminated pool: its labelled images, and the share of its other images that is OOD.
LABELLED = 24
MISMATCH = 0.75

# What is done to a training that would be stable without it: changes of `iml.Training`.
DISTURBANCES: dict[str, dict[str, Any]] = {
    "none": {},
    "momentum .9": {"momentum": 0.9},
    "batch of 20": {"batch": 20},
    "other batch for the curvature": {"batch": 20, "shared_batch": False},
    "BatchNorm in train mode": {"batch": 20, "frozen_statistics": False},
    "bfloat16": {"dtype": "bfloat16"},
    "outer rate × 4": {"outer_factor": 4.0},
    "negative curvature (T = 1)": {"inner_steps": 1},
    "sketch kept for 10 steps": {"method": "nystrom", "renew": 10, "damping": 0.01},
}
# Changes that keep a training stable.
REMEDIES: dict[str, dict[str, Any]] = {
    "automatic step": {"automatic_step": True, "neumann_step": False},
    "damping": {"damping": 0.1},
    "Gauss-Newton": {"curvature": "gauss_newton"},
    "frozen statistics": {"frozen_statistics": True},
    "shared batch": {"shared_batch": True},
    "normalised hypergradient": {"normalise": True},
    "averaging": {"average": 0.9},
    # A tenth is more than mini-batches move the outer loss, and less than forgetting does.
    "backtracking": {"backtrack": 0.1},
}
