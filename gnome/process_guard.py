"""The guard of a child process: `python -I -S process_guard.py PARENT MEMORY LC_CTYPE COMMAND...`, which `gnome.processes` runs.

It stands between this program and the child, at the head of the child's process group.  It ends all that the child has started: when
the child ends, when this program is gone in whatever way, or when it is asked to (SIGTERM).  On Linux what loses its parent below the
guard comes to the guard, so that none can get away, neither by a group or session of its own nor by a double fork.  It ends as the child
did, and imports nothing of ours and little else, to be there at once.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

_LINUX = sys.platform.startswith("linux")
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_POLL_SECONDS = 0.25
_END_SECONDS = 5.0


def main() -> NoReturn:
    """Start the command, wait for its end or for a reason to end it, and leave nothing behind."""
    parent, memory, ctype, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    asked: list[int] = []
    heard, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else _pipe()
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    control = _control()
    control(_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may have to end by the child's signal
    if ctype:  # Python may have changed it for itself
        os.environ["LC_CTYPE"] = ctype
    else:
        os.environ.pop("LC_CTYPE", None)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, memory, control, guard)
    _let_go_of_files({heard, wakes})
    status = None
    while status is None and not asked and os.getppid() == parent:
        status = _status(child)
        if status is None:
            select.select([heard], [], [], _POLL_SECONDS)
            with contextlib.suppress(BlockingIOError):
                os.read(heard, 4096)
    _end_all(child)
    _end_as(status)


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


def _control() -> Callable[[int, int], int]:
    """The system's call `prctl`, where there is one."""
    if not _LINUX:
        return lambda *_: 0
    function = ctypes.CDLL(None).prctl
    function.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return lambda what, value: int(function(what, value, 0, 0, 0))


def _become(command: list[str], memory: int, control: Callable[[int, int], int], guard: int) -> NoReturn:
    """Turn into the command, which ends with the guard."""
    try:
        signal.set_wakeup_fd(-1)
        for changed in (signal.SIGCHLD, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):  # the latter two by Python
            signal.signal(changed, signal.SIG_DFL)
        if _LINUX:
            control(_SET_PDEATHSIG, signal.SIGKILL)
            if memory:
                with contextlib.suppress(ValueError):  # a lower limit stands already
                    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        else:
            os.setpgid(0, 0)
        if os.getppid() == guard:  # which may have ended before the system was told
            os.execvp(command[0], command)  # noqa: S606 - no shell
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _let_go_of_files(kept: set[int]) -> None:
    """Hold no end of a pipe open that the child may close."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - pathlib takes long to load
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def _status(child: int) -> int | None:
    """How the child ended, None while it runs; what has come here after its parent's end is taken leave of on the way."""
    while True:
        pid, status = _ended()
        if pid == child:
            return status
        if pid <= 0:
            return None


def _ended() -> tuple[int, int]:
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # there is none
        return -1, 0


def _end_all(child: int) -> None:
    """Kill every child until there is none: those of the killed come here."""
    deadline = time.monotonic() + _END_SECONDS
    if not _LINUX:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        pid = 1
        while pid > 0:
            pid, _ = _ended()
        if pid < 0:
            return
        for pid in _children():
            with contextlib.suppress(OSError):  # gone, or another user's
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _children() -> list[int]:
    found = []
    for entry in os.listdir("/proc") if _LINUX else ():  # noqa: PTH208
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(entry))
    return found


def _end_as(status: int | None) -> NoReturn:
    """End as the child did; where it was ended, as what was killed."""
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
