"""A worker process: `python -m dft_stub.worker FD` takes tasks from a pipe, one at a time, and sends the answers back.

It is a program of its own rather than a fork: the parent may hold threads and a database, and its main script need not be importable.
Interrupts are the parent's to handle.  When the parent dies in any way, the worker's guard (`gnome.process_guard`) ends it.
"""

import contextlib
import faulthandler
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from gnome.errors import EvaluatorUnavailable

ADDRESS_SPACE_OVERHEAD = 6 * 2**30
"""Bytes that a process with torch maps without ever touching; the limit on mapped memory leaves room for them."""

_GRACE_SECONDS = 30.0


def main() -> None:
    """Serve until the pipe closes."""
    connection = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the parent closed the pipe
        _serve(connection)


def _serve(connection: Connection) -> None:
    memory_bytes, seconds, make_function = connection.recv()
    if memory_bytes is not None:
        limit = memory_bytes + ADDRESS_SPACE_OVERHEAD
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function = make_function()
    except EvaluatorUnavailable as error:
        connection.send(("unusable", str(error)))
        return
    connection.send(("ready", None))
    while True:
        payload = connection.recv()
        # A second fence for a task that holds the interpreter while nobody watches: this timer needs no interpreter.
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
        answer = _answer(function, payload)
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


def _answer(function: Any, payload: Any) -> tuple[str, Any]:
    try:
        return "done", function(payload)
    except MemoryError as error:
        return "memory", str(error)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:300]
        return "raised", f"{type(error).__name__}: {first_line}"


if __name__ == "__main__":
    main()
