"""Runs the command as `python -m ghost_engines.cli`."""

import sys

from ghost_engines.cli import main

sys.exit(main())
