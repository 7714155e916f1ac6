"""What every test process shares, whichever package it tests."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
from tests.fresh import Fresh, waiting

# One thread of arithmetic: the tensors of the tests are tiny, and other processes run beside, so
# that more threads would only wait for each other. Set before torch and numpy are imported, and
# for the programs that tests start.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

SPARED = pytest.StashKey[int]()
"""How many modules there were when the garbage collector was last spared what stays."""


def pytest_collectstart() -> None:
    """Collect no garbage while tests are collected: nearly all that is made then stays."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the garbage collector modules and thousands of collected tests."""
    spare(session)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Spare it what a test has imported, such as torch's compiler, and what a file leaves."""
    imported = len(sys.modules) > item.session.stash[SPARED] + 200
    last = nextitem is None or nextitem.path != item.path
    if imported or (last and len(gc.get_objects()) > 50_000):
        spare(item.session)


def spare(session: pytest.Session) -> None:
    """Hide from the garbage collector what is there and no garbage.

    Tests that look for leaks collect hundreds of times, which took up to a second each.
    """
    gc.collect()
    gc.freeze()
    session.stash[SPARED] = len(sys.modules)


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """Run programs in processes of their own that have imported torch, and nothing of ghost's."""
    with waiting() as run:
        yield run
