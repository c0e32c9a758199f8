"""A Prefect server to talk to: the one that PREFECT_API_URL names, or one of our own that ends with this process.

Prefect would start a temporary server by itself, in the group of processes that the terminal interrupts: Ctrl-C ends it first, and the
flow then waits for minutes for a server that is gone.  Ours, `python -P -m flows.prefect_server`, is a child as `gnome.processes` starts
them: in a session of its own, ended when this process ends or is killed.
"""

import atexit
import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any, Final

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_UI_ENABLED,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)

from gnome.errors import GnomeError
from gnome.processes import child_environment, end, python_command, start

PATIENCE_SECONDS: Final = 120.0
"""How long a server of ours may take to be there, unless PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS says otherwise."""

_POLL_SECONDS: Final = 0.2
_END_SECONDS: Final = 3.0


@contextlib.contextmanager
def use_server(*, scheduling: bool = False) -> Iterator[str]:
    """Have Prefect talk to a server that answers while the block runs; yields its URL.

    With `scheduling`, a server of our own starts runs that are due.  What Prefect cannot do for want of a server raises GnomeError in one
    line that says what to do.
    """
    named = PREFECT_API_URL.value()
    if named:
        advice = "start it with `prefect server start`, or unset PREFECT_API_URL for a temporary one"
    else:
        advice = "start one with `prefect server start` and name it in PREFECT_API_URL"
    if not scheduling:
        advice += ", or leave Prefect out with `--plain`"
    if named:
        _require_answer(named, advice)
        changes: dict[Any, Any] = {}
    else:
        # It has no pages to look at, and where it does not answer on this machine it has died: no use in asking for minutes.
        changes = {
            PREFECT_UI_URL: "",
            PREFECT_CLIENT_MAX_RETRIES: 1,
            PREFECT_API_URL: _start(scheduling=scheduling, advice=advice),
        }
    url = named or changes[PREFECT_API_URL]
    try:
        with temporary_settings(changes):
            yield url
    except (httpx.HTTPError, PrefectException) as error:
        raise GnomeError(f"the Prefect server at {without_password(url)} fails ({_brief(error)}); {advice}") from None


def _require_answer(url: str, advice: str) -> None:
    """Say in one line that the server named by the environment does not answer, before Prefect says it in a hundred."""
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except Exception as error:  # whatever a URL that is none, a proxy or a certificate gives
        problem = error
    if problem is not None:
        raise GnomeError(
            f"the Prefect server at PREFECT_API_URL={without_password(url)} does not answer ({_brief(problem)}); {advice}"
        )


def _start(*, scheduling: bool, advice: str) -> str:
    """Start a server that ends with this process, and wait until it answers; returns its URL."""
    allowed = get_current_settings().server.ephemeral
    if "enabled" in allowed.model_fields_set and not allowed.enabled:
        raise GnomeError(f"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids a temporary Prefect server; {advice}")
    seconds = (
        float(allowed.startup_timeout_seconds) if "startup_timeout_seconds" in allowed.model_fields_set else PATIENCE_SECONDS
    )
    environment = child_environment(
        get_current_settings().to_environment_variables(exclude_unset=True) | {PREFECT_UI_ENABLED.name: "0"},
    )
    with tempfile.TemporaryFile("w+", errors="replace") as said, socket.create_server(("127.0.0.1", 0)) as place:
        place.listen(0)
        url = f"http://127.0.0.1:{place.getsockname()[1]}/api"
        process = start(
            python_command("flows.prefect_server", str(place.fileno()), "scheduling" if scheduling else "quiet"),
            environment=environment,
            stdout=said,
            stderr=said,
            descriptors=[place.fileno()],
        )
        atexit.register(end, process, terminate_seconds=_END_SECONDS)  # after Prefect's own threads have sent what they hold
        problem = _wait_for(process, url, seconds)
        if problem:
            end(process, terminate_seconds=_END_SECONDS)
            raise GnomeError(f"{problem}{_last_line(said)}; {advice}")
    return url


def _wait_for(process: "subprocess.Popen[bytes]", url: str, seconds: float) -> str:
    """Wait for the server's first answer; returns what went wrong, nothing when it is there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"the temporary Prefect server ended at once with exit code {process.returncode}"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=min(5.0, seconds), trust_env=False).is_success:
                return ""
        time.sleep(_POLL_SECONDS)
    return f"the temporary Prefect server did not answer within {seconds:g} s"


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    lines = [line.strip() for line in said.read()[-20_000:].splitlines() if line.strip()]
    return f" ({lines[-1][:300]})" if lines else ""


def without_password(text: str) -> str:
    """What is said of an address, or with one in it, without the name and password that may stand in the address."""
    return re.sub(r"//[^\s'\"]*@", "//...@", text)


def _brief(error: Exception) -> str:
    return without_password(" ".join(str(error).split()))[:200] or type(error).__name__


def main() -> None:
    """Serve on a socket that the parent has opened: `... FD scheduling|quiet`."""
    place, kind = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]

    import uvicorn  # noqa: PLC0415 - with Prefect's server, seconds
    from prefect.server.api.server import create_app  # noqa: PLC0415

    app = create_app(ephemeral=kind != "scheduling", final=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)).run(sockets=[place])


if __name__ == "__main__":
    main()
