"""Who works on something: a process of a host, written `pid@host#start`.

The start of the process tells it from a later one that was given the same number: on Linux the ticks since the machine started and the
id of that start, which no change of the clock moves.
"""

import os
import socket
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def this_process() -> str:
    """Name this process as an owner."""
    pid = os.getpid()
    return f"{pid}@{socket.gethostname()}#{_start_of(pid)}"


def is_dead(owner: str) -> bool:
    """Say whether an owner is known to have ended: a process of this host that is there no more.

    Of processes on other hosts, and of owners spelled otherwise, nothing is known; their leases run out.
    """
    process, _, started = owner.partition("#")
    pid, _, host = process.partition("@")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        found = psutil.Process(int(pid))
        return bool(found.status() == psutil.STATUS_ZOMBIE or (started and _start_of(int(pid)) != started))
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _start_of(pid: int) -> str:
    """When a process began; raises psutil.NoSuchProcess."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}-{ticks}"
    except (OSError, IndexError):
        return f"{psutil.Process(pid).create_time():.0f}"


def readable_owner(owner: str) -> str:
    """Name an owner for people, without the start time."""
    return owner.partition("#")[0]
