"""How much memory this process takes, as Linux counts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

KIT = Path(__file__).parent


def kib(field):
    """Return a field of the process's status: VmRSS is what it holds, VmHWM the most it ever held.

    `getrusage` would count what the process held that started this one, too.
    """
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def printed(program, *arguments):
    """Return the number that a program prints, run in a process of its own beside this file.

    What it frees goes back to the system at once, or holes in the heap would count too.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=KIT)
    return int(done.stdout)
