"""How much memory this process takes, as Linux counts it."""

import re
from pathlib import Path

KIT = Path(__file__).parent


def kib(field):
    """Return a field of the process's status: VmRSS is what it holds, VmHWM the most it ever held.

    `getrusage` would count what the process held that started this one, too.
    """
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
