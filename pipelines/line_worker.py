"""Other programs that may hang, crash or fill the memory, kept within hard limits.

`LineWorker` keeps one alive for many questions, one JSON line in and one out: what fails is killed and started anew for the next
question, so one bad question costs itself alone.  `run_bounded` runs one to its end.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

if sys.platform == "linux":
    import resource


class WorkerLost(Exception):
    """The program gave no answer; the message says what it did instead."""


class LineWorker:
    """Talks to one program over its standard streams; started at the first question."""

    def __init__(self, command: Sequence[str], *, memory_limit: int, environment: Mapping[str, str] | None = None) -> None:
        """Remember what to run; `memory_limit` is in megabytes of address space, enforced on Linux."""
        self._command = list(command)
        self._memory_limit = memory_limit
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def ask(self, question: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """Send a question and wait for its answer, at most `time_limit` seconds (start-up of the program included).

        Raises WorkerLost when there is none in time, the program ends, or what it says is no JSON object; it is then gone.
        """
        process = self._started()
        if process.stdin is None or process.stdout is None:
            raise WorkerLost("has no streams")
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(process.stdout.fileno(), time.monotonic() + time_limit)
            answer = json.loads(line)
        except (BrokenPipeError, EOFError):
            code = process.wait()
            self.close()
            raise WorkerLost(f"ended with exit code {code}") from None
        except TimeoutError:
            self.close()
            raise WorkerLost(f"gave no answer within {time_limit:g} s") from None
        except ValueError:
            self.close()
            raise WorkerLost("answered with something that is no JSON") from None
        except BaseException:
            self.close()  # an interrupted question leaves an answer behind that must not meet the next one
            raise
        if not isinstance(answer, dict):
            self.close()
            raise WorkerLost("answered with something that is no JSON object")
        return answer

    def close(self) -> None:
        """Kill the program if it runs."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        _end(process)

    def kill(self) -> None:
        """Kill the program and leave the rest to whoever waits for its answer; safe to call from another thread."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = _start(self._command, self._memory_limit, self._environment)
        return self._process

    def _read_line(self, descriptor: int, deadline: float) -> bytes:
        while b"\n" not in self._unread:
            part = _read_part(descriptor, deadline)
            if not part:
                raise EOFError
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line


def run_bounded(command: Sequence[str], given: bytes, *, time_limit: float, memory_limit: int, max_output: int) -> bytes:
    """Run a program on a short input and return its output.

    `time_limit` in seconds, `memory_limit` in megabytes, `max_output` in bytes.  Raises WorkerLost when a limit is passed or the
    program fails; it and its children are gone then.
    """
    process = _start(command, memory_limit, dict(os.environ))
    try:
        if process.stdin is None or process.stdout is None:
            raise WorkerLost("has no streams")
        with contextlib.suppress(BrokenPipeError):  # it need not read its input to the end
            process.stdin.write(given)
            process.stdin.close()
        deadline = time.monotonic() + time_limit
        output = b""
        while part := _read_part(process.stdout.fileno(), deadline):
            output += part
            if len(output) > max_output:
                raise WorkerLost(f"wrote more than {max_output} bytes")
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise WorkerLost(f"gave no answer within {time_limit:g} s") from None
    finally:
        _end(process)
    if code != 0:
        raise WorkerLost(f"ended with exit code {code}")
    return output


def _start(command: Sequence[str], memory_limit: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own, its address space limited where the system can (Linux)."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    if sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (memory_limit * 2**20, memory_limit * 2**20))
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program with its children and close its streams."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _read_part(descriptor: int, deadline: float) -> bytes:
    """Read what is there; empty at the end.  Raises TimeoutError when nothing comes until the deadline."""
    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        raise TimeoutError
    return os.read(descriptor, 65536)
