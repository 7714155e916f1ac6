"""Runs the command `ghost` as `python -m ghost_engines`, as launchers of processes do."""

import os
import sys

_HERE = os.getcwd()
_INSTALLED = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.path[:1] == [_HERE] and _HERE != _INSTALLED:
    # Python puts the working directory on the path for `-m`, and that may be a folder of a model
    # that somebody downloaded: no module that lies there is imported but those that one names.
    sys.path.pop(0)

from ghost_engines.cli import main  # noqa: E402

sys.exit(main())
