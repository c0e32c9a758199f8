"""Child processes that may hang, crash or fill the memory, kept within hard limits.

Every child leads a process group of its own and ends as a whole: its children, those that moved to another group (as the ranks of an
MPI program do) included.  It imports this program and not a folder of the same name where the user stands.  `run_bounded` runs a
program to its end; `LineWorker` keeps one alive for many questions, one JSON line in and one out; `start` and `end` are for the rest.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import psutil  # type: ignore[import-untyped]

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PASSIVE_THREADS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Threads that wait for work sleep: spinning, they take the cores from whoever shares the machine."""

_ROOT: Final = str(Path(__file__).resolve().parent.parent)
"""Folder that holds this program's packages."""


class ProcessLost(Exception):
    """A child gave no answer; the message says what it did instead."""


class ProcessTimeout(ProcessLost):
    """A child took longer than it was given."""


def usable_cores() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python_command(module: str, *arguments: str) -> list[str]:
    """Command that runs a module of ours; `-P` keeps the working folder from taking its place."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(extra: Mapping[str, str] | None = None, *, threads: int = 1) -> dict[str, str]:
    """Environment of a child: ours, so many threads that wait passively, and the same modules as here.

    The working folder, where it is searched for modules at all, comes last.
    """
    here = str(Path.cwd())
    paths = [str(Path(entry or ".").resolve()) for entry in sys.path]
    first = [path for path in paths if path != here or path == _ROOT]
    if _ROOT not in first:
        first.insert(0, _ROOT)
    searched = dict.fromkeys([*first, *(path for path in paths if path == here)])
    return {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        **PASSIVE_THREADS,
        "PYTHONPATH": os.pathsep.join(searched),
        "PYTHONSAFEPATH": "1",
        **(extra or {}),
    }


def start(
    command: Sequence[str],
    *,
    memory_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    folder: str | None = None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a program as the head of a process group; `memory_bytes` bounds its address space where the system can (Linux).

    `environment` is `child_environment()` unless given; `descriptors` are left open for it.
    """
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=child_environment() if environment is None else environment,
        cwd=folder,
        pass_fds=tuple(descriptors),
        start_new_session=True,
    )
    if memory_bytes is not None and hasattr(resource, "prlimit"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a program with all its children, and close its streams."""
    kill_tree(process.pid)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def kill_tree(pid: int) -> None:
    """Kill the process group that `pid` heads and all its descendants; the process itself last when it is this one.

    A group that this process is in without being its head belongs to others and is left alone.
    """
    descendants = _descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if pid != os.getpid():
            os.killpg(pid, signal.SIGKILL)
    for child in descendants:
        with contextlib.suppress(psutil.Error):
            child.kill()
    if pid == os.getpid() == os.getpgrp():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(0, signal.SIGKILL)


def processor_seconds(pid: int) -> float:
    """Processor time of a process and all its descendants so far, those that have ended and were waited for included."""
    total = 0.0
    for process in _with_descendants(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def own_processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants."""
    total = 0
    for process in _with_descendants(pid):
        with contextlib.suppress(psutil.Error):
            total += int(process.memory_info().rss)
    return total


def _with_descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid), *_descendants(pid)]
    return []


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def end_with_parent(parent: int, *, poll_seconds: float = 0.5) -> None:
    """Watch the parent and kill this process with all its children once it is gone; for a thread of a child."""
    while os.getppid() == parent:
        time.sleep(poll_seconds)
    kill_tree(os.getpid())
    os._exit(1)  # where this process heads no group


def run_bounded(
    command: Sequence[str],
    given: bytes,
    *,
    seconds: float,
    memory_bytes: int | None,
    max_output: int,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program on an input and return its output, of at most `max_output` bytes.

    Raises ProcessLost when a limit is passed or the program fails; it and its children are gone then.
    """
    pipe = subprocess.PIPE
    process = start(command, memory_bytes=memory_bytes, environment=environment, stdin=pipe, stdout=pipe)
    try:
        output = _exchange(process, given, time.monotonic() + seconds, max_output)
        code = process.wait(seconds)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise ProcessTimeout(f"gave no answer within {seconds:g} s") from None
    finally:
        end(process)
    if code != 0:
        raise ProcessLost(f"ended with exit code {code}")
    return output


def _exchange(process: "subprocess.Popen[bytes]", given: bytes, deadline: float, max_output: int) -> bytes:
    """Write the input and read the output at the same time, so that neither side waits for the other."""
    if process.stdin is None or process.stdout is None:
        raise ProcessLost("has no streams")
    os.set_blocking(process.stdin.fileno(), False)
    output, left, is_open = b"", memoryview(given), True
    while True:
        if is_open and not left:
            process.stdin.close()
            is_open = False
        readable, writable, _ = select.select(
            [process.stdout], [process.stdin] if is_open else [], [], max(0.0, deadline - time.monotonic())
        )
        if not readable and not writable:
            raise TimeoutError
        if writable:
            try:
                left = left[os.write(process.stdin.fileno(), left[:65536]) :]
            except BrokenPipeError:  # it need not read its input to the end
                left = left[:0]
        if readable:
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                return output
            output += part
            if len(output) > max_output:
                raise ProcessLost(f"wrote more than {max_output} bytes")


class LineWorker:
    """Talks to one program over its standard streams; started at the first question.

    What fails is killed and started anew for the next question, so one bad question costs itself alone.
    """

    def __init__(self, command: Sequence[str], *, memory_bytes: int | None, environment: Mapping[str, str] | None = None) -> None:
        """Remember what to run; `memory_bytes` of address space, enforced on Linux."""
        self._command = list(command)
        self._memory_bytes = memory_bytes
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def ask(self, question: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Send a question and wait for its answer, at most so many seconds (start-up of the program included).

        Raises ProcessLost when there is none in time, the program ends, or what it says is no JSON object; it is then gone.
        """
        process = self._started()
        if process.stdin is None or process.stdout is None:
            raise ProcessLost("has no streams")
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(self._read_line(process.stdout.fileno(), time.monotonic() + seconds))
        except (BrokenPipeError, EOFError):
            code = process.wait()
            self.close()
            raise ProcessLost(f"ended with exit code {code}") from None
        except TimeoutError:
            self.close()
            raise ProcessTimeout(f"gave no answer within {seconds:g} s") from None
        except ValueError:
            self.close()
            raise ProcessLost("answered with something that is no JSON") from None
        except BaseException:
            self.close()  # an interrupted question leaves an answer behind that must not meet the next one
            raise
        if not isinstance(answer, dict):
            self.close()
            raise ProcessLost("answered with something that is no JSON object")
        return answer

    def close(self) -> None:
        """Kill the program if it runs."""
        process, self._process, self._unread = self._process, None, b""
        if process is not None:
            end(process)

    def kill(self) -> None:
        """Kill the program and leave the rest to whoever waits for its answer; safe to call from another thread."""
        process = self._process
        if process is not None:
            kill_tree(process.pid)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = start(
                self._command, memory_bytes=self._memory_bytes, environment=self._environment, stdin=pipe, stdout=pipe
            )
        return self._process

    def _read_line(self, descriptor: int, deadline: float) -> bytes:
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(descriptor, 65536)
            if not part:
                raise EOFError
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line
