"""Memory that is given back: a device runs for months beside somebody's other programs.

glibc keeps large freed blocks for itself, and more of them after every training session. With a fixed
threshold it maps them apart and returns them at once (decision 0009).
"""

from __future__ import annotations

import ctypes
import sys

THRESHOLD_BYTES = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def give_back_large_blocks() -> None:
    """From now on, for this process; does nothing where the C library is another."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, THRESHOLD_BYTES)
            mallopt(_M_TRIM_THRESHOLD, THRESHOLD_BYTES)
