"""A pool of worker processes in which every task has a limit on its time and its memory.

A task that hangs, eats memory or takes its process down costs that one task a failure and the pool one fresh process; every other task
is answered as if nothing had happened.  Workers start when the first task comes and end with the parent, however it ends.
"""

import contextlib
import signal
import subprocess
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dft_stub.evaluator import Failure
from gnome.errors import EvaluatorUnavailable
from gnome.processes import end, processor_seconds, python_command, resident_bytes, start

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0  # between two looks at what a worker and its children use, which take a millisecond or more
_START_SECONDS = 180.0
_MAX_FAILED_STARTS = 2
_LAST_SECONDS = 10.0  # for a worker that has closed its connection to end


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """What one task may use: seconds of wall-clock time, bytes of resident memory, those of its children included.

    The time limit is there for what hangs; it is long, so that a slow machine does not change an answer.
    `bounds_addresses`: whether mapped memory is limited too; not where CUDA is used, which maps far more than it touches.
    """

    seconds: float = 900.0
    memory_bytes: int = 2 * 2**30
    bounds_addresses: bool = True


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """What became of a task: its result, or a failure with a message; `seconds` of processor time, its children's included."""

    task: str
    result: Any = None
    failure: Failure | None = None
    message: str = ""
    seconds: float = 0.0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    folder: "tempfile.TemporaryDirectory[str]"
    started: float
    ready: bool = False
    task: tuple[str, Any] | None = None
    task_started: float = 0.0
    used_before: float = 0.0
    used: float = 0.0
    looked: float = 0.0

    def begin(self, task: tuple[str, Any]) -> None:
        self.task, self.task_started = task, time.monotonic()
        self.used_before = self.used = processor_seconds(self.process.pid)

    def look(self) -> None:
        """Note the processor time so far; once the process has ended there is none to be had."""
        self.used = max(self.used, processor_seconds(self.process.pid))

    def end(self) -> None:
        end(self.process)
        self.connection.close()
        self.folder.cleanup()

    def last_words(self) -> str:
        """Say how the process ended, with the last line it wrote on stderr."""
        try:
            code = self.process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:  # as where a code closes files that are not its own
            return "it closed its connection and lived on"
        cause = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        stderr = Path(self.folder.name, "stderr").read_text(errors="replace").strip().splitlines()
        return f"{cause}, {stderr[-1][:300]}" if stderr else cause


class WorkerPool:
    """Runs one function on many payloads, each under `limits`; see the module.

    `make_function` is called once in every worker and returns the function; it, the payloads and the results are pickled, so it must be
    importable (not from a main script).  If it raises EvaluatorUnavailable, so does `outcomes`.
    """

    def __init__(self, make_function: Callable[[], Callable[[Any], Any]], *, workers: int, limits: WorkerLimits) -> None:
        self._make_function = make_function
        self._n_workers = max(1, workers)
        self._limits = limits
        self._queue: deque[tuple[str, Any]] = deque()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def submit(self, task: str, payload: Any) -> None:
        """Queue a task under its name; work begins at once when a worker is free."""
        self._queue.append((task, payload))
        self._dispatch()

    @property
    def n_unfinished(self) -> int:
        """Tasks queued or running."""
        return len(self._queue) + sum(worker.task is not None for worker in self._workers)

    def outcomes(self) -> Iterator[TaskOutcome]:
        """Yield outcomes as tasks end, until none is left; an interrupt ends the workers and leaves their tasks queued."""
        try:
            while self.n_unfinished:
                self._dispatch()
                yield from self._step()
        except (KeyboardInterrupt, EvaluatorUnavailable):
            self.close()
            raise

    def close(self) -> None:
        """End every worker; running tasks go back to the head of the queue."""
        self._queue.extendleft(worker.task for worker in reversed(self._workers) if worker.task is not None)
        _end_all(self._workers)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers there are: of their guards, each of which ends after its worker."""
        return [worker.process.pid for worker in self._workers]

    def _dispatch(self) -> None:
        idle = sum(worker.task is None for worker in self._workers)
        while len(self._workers) < self._n_workers and idle < len(self._queue):
            self._workers.append(_start(self._make_function, self._limits))
            idle += 1
        for worker in self._workers:
            if self._queue and worker.ready and worker.task is None:
                with contextlib.suppress(OSError):  # a worker that has just died is found by _step
                    worker.connection.send(self._queue[0][1])
                worker.begin(self._queue.popleft())

    def _step(self) -> Iterator[TaskOutcome]:
        """Wait a moment for messages, then look at every worker's limits."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=_POLL_SECONDS):
            worker = by_connection[connection]  # type: ignore[index]  # only connections were waited for
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                outcome = self._lost(worker)
            else:
                outcome = self._heard(worker, kind, value)
            if outcome is not None:
                yield outcome
        for worker in list(self._workers):
            if (outcome := self._over_limit(worker)) is not None:
                yield outcome

    def _heard(self, worker: _Worker, kind: str, value: Any) -> TaskOutcome | None:
        if kind == "unusable":
            raise EvaluatorUnavailable(value)
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
            self._dispatch()
            return None
        if kind == "done":
            return self._finish(worker, result=value)
        failure = Failure.OUT_OF_MEMORY if kind == "memory" else Failure.CRASHED
        return self._finish(worker, failure=failure, message=value or "out of memory")

    def _lost(self, worker: _Worker) -> TaskOutcome | None:
        words = worker.last_words()
        if not worker.ready:
            self._failed_starts += 1
            self._drop(worker)
            if self._failed_starts > _MAX_FAILED_STARTS:
                raise EvaluatorUnavailable(f"worker processes do not start: {words}")
            return None
        outcome = (
            self._finish(worker, failure=Failure.CRASHED, message=f"the worker process was lost: {words}")
            if worker.task
            else None
        )
        self._drop(worker)
        return outcome

    def _over_limit(self, worker: _Worker) -> TaskOutcome | None:
        now = time.monotonic()
        if not worker.ready and now - worker.started > _START_SECONDS:
            raise EvaluatorUnavailable(f"a worker process was not ready after {_START_SECONDS:.0f} seconds")
        if worker.task is None:
            return None
        outcome = None
        if now - worker.task_started > self._limits.seconds:
            outcome = self._finish(worker, failure=Failure.TIMEOUT, message=f"no answer within {self._limits.seconds:g} seconds")
        elif now - worker.looked > _LOOK_SECONDS:
            worker.looked = now
            worker.look()
            if (resident := resident_bytes(worker.process.pid)) > self._limits.memory_bytes:
                text = f"{resident / 2**20:.0f} MiB in use, the limit is {self._limits.memory_bytes / 2**20:.0f}"
                outcome = self._finish(worker, failure=Failure.OUT_OF_MEMORY, message=text)
        if outcome is not None:
            self._drop(worker)
        return outcome

    def _finish(self, worker: _Worker, *, result: Any = None, failure: Failure | None = None, message: str = "") -> TaskOutcome:
        name = worker.task[0] if worker.task else ""
        worker.task = None
        worker.look()
        seconds = worker.used - worker.used_before
        return TaskOutcome(task=name, result=result, failure=failure, message=message, seconds=seconds)

    def _drop(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)


def _start(make_function: Callable[[], Callable[[Any], Any]], limits: WorkerLimits) -> _Worker:
    ours, theirs = Pipe()
    folder = tempfile.TemporaryDirectory(prefix="gnome-worker-", ignore_cleanup_errors=True)
    with Path(folder.name, "stderr").open("wb") as stderr:
        process = start(
            python_command("dft_stub.worker", str(theirs.fileno())),
            descriptors=[theirs.fileno()],
            stderr=stderr,
            folder=folder.name,  # codes leave files where they run
        )
    theirs.close()
    worker = _Worker(process, ours, folder, time.monotonic())
    with contextlib.suppress(OSError):  # it died while starting; reading the pipe will say so
        ours.send((limits.memory_bytes if limits.bounds_addresses else None, limits.seconds, make_function))
    return worker


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
