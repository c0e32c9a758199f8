"""Child processes that may hang, crash or fill the memory, kept within hard limits.

Every child stands in a process group of its own, under a guard (`gnome.process_guard`) that ends it as a whole: its children too, those
that moved to another group (as the ranks of an MPI program do), that lost their parent or were forked twice included; and however this
program itself ends.  It imports this program and not a folder of the same name where the user stands.  `run_bounded` runs a
program to its end; `LineWorker` keeps one alive for many questions, one JSON line in and one out; `start` and `end` are for the rest.
"""

import contextlib
import json
import os
import select
import shutil
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
_GUARD: Final = str(Path(__file__).resolve().with_name("process_guard.py"))
_END_SECONDS: Final = 10.0
"""How long a guard may take to end what it guards before it is ended too."""
MAX_LINE: Final = 2**26
"""Bytes that one answer of a `LineWorker` may have."""


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
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.DEVNULL,
    stderr: int | IO[Any] = subprocess.DEVNULL,
    folder: str | None = None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a program under a guard, which heads a process group; `memory_bytes` bounds its address space where the system can (Linux).

    `environment` is `child_environment()` unless given; `descriptors` are left open for it.  What is returned is the guard, which ends as
    the program does, and after all that it has started.  Raises FileNotFoundError when there is no such program.
    """
    environment = child_environment() if environment is None else environment
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        raise FileNotFoundError(f"{command[0]}: no such program")
    guard = [sys.executable, "-I", "-S", _GUARD, str(os.getpid()), str(memory_bytes or 0), environment.get("LC_CTYPE", "")]
    return subprocess.Popen(
        [*guard, *command],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        cwd=folder,
        pass_fds=tuple(descriptors),
        start_new_session=True,
    )


def end(process: "subprocess.Popen[bytes]", *, terminate_seconds: float = 0.0) -> None:
    """Kill a program with all its children, and close its streams; with `terminate_seconds` it is asked first, and given so long."""
    if terminate_seconds and process.poll() is None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(terminate_seconds)
    ask_to_end(process)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:  # something stops the guard itself
        kill_tree(process.pid)
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def ask_to_end(process: "subprocess.Popen[bytes]") -> None:
    """Have the guard kill what it guards, without waiting for it; safe to call from another thread."""
    process.send_signal(signal.SIGTERM)


def kill_tree(pid: int) -> None:
    """Kill the process group that `pid` heads and all its descendants."""
    descendants = _descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for child in descendants:
        with contextlib.suppress(psutil.Error):
            child.kill()


def processor_seconds(pid: int) -> float:
    """Processor time of a process and all its descendants so far, those that have ended and were waited for included."""
    total = 0.0
    for process in _with_descendants(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


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
    deadline = time.monotonic() + seconds
    pipe = subprocess.PIPE
    process = start(command, memory_bytes=memory_bytes, environment=environment, stdin=pipe, stdout=pipe)
    try:
        output = bytearray()
        _exchange(process, given, output, deadline, max_output=max_output, to_the_end=True)
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise ProcessTimeout(f"gave no answer within {seconds:g} s") from None
    finally:
        end(process)
    if code != 0:
        raise ProcessLost(f"ended with exit code {code}")
    return bytes(output)


def _exchange(
    process: "subprocess.Popen[bytes]", given: bytes, received: bytearray, deadline: float, *, max_output: int, to_the_end: bool
) -> None:
    """Write the input and read the output at the same time, so that neither side waits for the other, to its end or to a line's.

    Raises TimeoutError when the deadline passes, however busy the program is; ProcessLost beyond `max_output` bytes; EOFError when it ends
    without a line.
    """
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise ProcessLost("has no streams")
    os.set_blocking(stdin.fileno(), False)
    left, has_line = memoryview(given), b"\n" in received
    while left or to_the_end or not has_line:
        if to_the_end and not left and not stdin.closed:
            stdin.close()
        seconds = deadline - time.monotonic()
        readable, writable, _ = select.select([stdout], [stdin] if left else [], [], max(0.0, seconds))
        if seconds <= 0 or not (readable or writable):
            raise TimeoutError
        if writable:
            try:
                left = left[os.write(stdin.fileno(), left[:65536]) :]
            except BrokenPipeError:  # it need not read its input to the end
                left = left[:0]
        if readable:
            part = os.read(stdout.fileno(), 65536)
            if not part and to_the_end:
                return
            if not part:
                raise EOFError
            received += part
            has_line = has_line or b"\n" in part
            if len(received) > max_output:
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
        self._unread = bytearray()

    def ask(self, question: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Send a question and wait for its answer, at most so many seconds (start-up of the program included).

        Raises ProcessLost when there is none in time, the program ends, or what it says is no JSON object of at most `MAX_LINE` bytes; it
        is then gone.
        """
        deadline = time.monotonic() + seconds
        process = self._started()
        try:
            _exchange(
                process, json.dumps(question).encode() + b"\n", self._unread, deadline, max_output=MAX_LINE, to_the_end=False
            )
            line, self._unread = self._unread.split(b"\n", 1)
            answer = json.loads(line)
        except EOFError:
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise ProcessTimeout(f"closed its output and did not end within {seconds:g} s") from None
            finally:
                self.close()
            raise ProcessLost(f"ended with exit code {code}") from None
        except TimeoutError:
            self.close()
            raise ProcessTimeout(f"gave no answer within {seconds:g} s") from None
        except (ValueError, RecursionError):
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
        process, self._process, self._unread = self._process, None, bytearray()
        if process is not None:
            end(process)

    def kill(self) -> None:
        """Kill the program and leave the rest to whoever waits for its answer; safe to call from another thread."""
        process = self._process
        if process is not None:
            ask_to_end(process)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = start(
                self._command, memory_bytes=self._memory_bytes, environment=self._environment, stdin=pipe, stdout=pipe
            )
        return self._process
