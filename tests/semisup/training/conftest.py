"""Training sets of two seeds, as plans of jobs take them."""

import pytest

from tests.semisup.helpers import arrays_of


@pytest.fixture
def sets(training_set):
    return {"seed_0000": arrays_of(training_set), "seed_0001": arrays_of(training_set)}
