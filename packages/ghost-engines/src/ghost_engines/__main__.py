"""Runs the command `ghost` as `python -m ghost_engines`, as launchers of processes do."""

import sys

from ghost_engines.cli import main

sys.exit(main())
