"""What every test process shares, whichever package it tests."""

import gc
import os

# One thread of arithmetic: the tensors of the tests are tiny, and other processes run beside, so
# that more threads would only wait for each other. Set before torch and numpy are imported, and
# for the programs that tests start.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


def pytest_collectstart() -> None:
    """Collect no garbage while tests are collected: nearly all that is made then stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays: modules, and thousands of collected tests.

    Tests that look for leaks collect hundreds of times, which took a second each.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
