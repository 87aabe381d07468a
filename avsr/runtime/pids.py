"""Processes of this machine by their numbers, which mean something only within one namespace."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> int:
    """Start of a process of this host in clock ticks since boot; 0 without such a process or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])  # ended, but not yet reaped by its parent


def namespace() -> int:
    """Of process ids, which containers on one host do not share; 0 where that is not known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
