"""What tests of trained runs share."""

from dataclasses import fields

import pytest
import torch

from weighmatch.semisup import TrainedRun


def same(a, b):
    """Whether two runs, or two nested containers, are equal, leaving out times."""
    if isinstance(a, TrainedRun):
        return isinstance(b, TrainedRun) and same(a.to_state(), b.to_state())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if "seconds" not in str(k))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def parameters(run):
    """The parameters of a run's classifier by name."""
    return run.classifier.state_dict()


def arrays_of(data):
    """The fields of a training set by name, as plans of jobs take them."""
    return {f.name: getattr(data, f.name) for f in fields(data)}


def fit_until_killed(schedule, data, folder, killed_at):
    """Train until `killed_at` steps are done and then stop as a signal would."""

    class KilledError(Exception):
        pass

    done = []

    def kill(steps):
        done.append(steps)
        if sum(done) >= killed_at:
            raise KilledError

    with pytest.raises(KilledError):
        schedule.fit(data, folder, kill)
