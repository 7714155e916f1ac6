"""What every test process shares, whichever package it tests: one thread of arithmetic.

The tensors of the tests are tiny, and other processes run beside, so that more threads would
only wait for each other.
"""

import os

# Set before torch and numpy are imported, and for the programs that tests start.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
