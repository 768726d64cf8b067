"""The environment, set before torch is imported, and rank processes that start once per module."""

import gc
import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["DS_ACCELERATOR"] = "cpu"
# Rank processes share the cores: more threads than one each only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest

from benchmarks.ranks import Ranks

# The same examples in every run, and none remembered: a test passes or fails by the code alone. No deadline: cores are
# shared; tests that promise a time measure it.
hypothesis.settings.register_profile("tests", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("tests")


def _ranks(number: int):
    @pytest.fixture(scope="module", name=f"ranks{number}")
    def ranks():
        with Ranks(number) as processes:
            processes.run(os.getpid)  # up and connected, before a test counts its seconds
            yield processes

    return ranks


ranks2, ranks3, ranks4 = map(_ranks, (2, 3, 4))


def pytest_collection_finish():
    # What was imported and collected stays: every collection of garbage would go through it again.
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what libraries look for at the end is collected as usual
