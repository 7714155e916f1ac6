"""Lets what is freed stay with the process, so that no way of a case pays for new memory."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_ALL = 2**30


def keep_freed() -> None:
    """Let the C library keep what is freed for the next step, as allocators for long runs do.

    Glibc gives what is free at the end of its heap back to the system. Where several ways take
    turns in one process, it is by chance whose last value lies there, and so whose steps wait for
    new pages: up to a fifth of a step, in either direction. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            library.mallopt(option, _ALL)
