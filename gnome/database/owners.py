"""Who works on something: a process of a host, written `pid@host#start`.

The start time of the process tells it from a later one that was given the same number.
"""

import os
import socket

import psutil  # type: ignore[import-untyped]


def this_process() -> str:
    """Name this process as an owner."""
    pid = os.getpid()
    return f"{pid}@{socket.gethostname()}#{psutil.Process(pid).create_time():.2f}"


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
        return bool(found.status() == psutil.STATUS_ZOMBIE or (started and f"{found.create_time():.2f}" != started))
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def readable_owner(owner: str) -> str:
    """Name an owner for people, without the start time."""
    return owner.partition("#")[0]
