"""What every test shares: one thread for tiny matrices, and no network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before torch is imported: a second thread on matrices this small only waits for the first, and on a busy machine it
# waits long (six times the processor time in one measured run).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

# No test is a timed test: a busy machine must not turn a property false.
settings.register_profile("gemcut", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gemcut")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A verb run inside a test talks to that test's stderr; the next test must not talk to the closed one.

    What a verb set up is taken away before the test as well as after it: a fixture of wider scope that runs a verb
    does so before this one, and what it leaves is not a state to come back to.
    """
    _untouched_logger()
    yield
    _untouched_logger()


def _untouched_logger() -> None:
    logger = logging.getLogger("gemcut")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
