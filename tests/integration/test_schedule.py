"""A campaign that the command line deploys is fired by its cron schedule, against a server of the test's own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from emt_world import copy_world

from flows.workspace import open_workspace
from gnome.database.store import Store

pytestmark = [pytest.mark.usefixtures("own_folder"), pytest.mark.timeout(420)]
BIN = Path(sys.executable).parent
PATIENCE = 200.0  # seconds: a start, at most a minute to the next full one, and a round


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, question: dict[str, Any] | None = None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def wait_for(what: Any, process: "subprocess.Popen[bytes]", log: Path) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if found := what():
                return found
        except OSError:  # the server is not there yet
            pass
        time.sleep(0.5)
    pytest.fail(f"nothing within {PATIENCE:.0f} s; the log ends with {log.read_text()[-3000:]}")


def test_a_deployment_made_by_the_command_line_is_fired_by_its_schedule(emt_world: Path, tmp_path: Path) -> None:
    settings = copy_world(emt_world, tmp_path / "world")
    api = f"http://127.0.0.1:{(port := free_port())}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": api,
        "GNOME_DATABASE_URL": settings.database_url,
        "GNOME_WORKERS": "1",
    }
    server_log, serve_log = tmp_path / "server.log", tmp_path / "serve.log"
    server_command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    schedule_command = [
        str(BIN / "gnome"), "campaign", "schedule", "--cron", "* * * * *", "--rounds", "1", "--name", "nightly",
        "--evaluator", "emt", "--candidates", "40", "--screened", "10", "--budget", "2",
    ]  # fmt: skip
    with running(server_command, server_log, environment) as server:
        wait_for(lambda: ask(f"{api}/health"), server, server_log)
        with running(schedule_command, serve_log, environment) as serving:
            fired = wait_for(lambda: fired_runs(api), serving, serve_log)
            (deployment,) = ask(f"{api}/deployments/filter", {})
    assert deployment["name"] == "nightly"
    assert [schedule["schedule"]["cron"] for schedule in deployment["schedules"]] == ["* * * * *"]
    assert fired[0]["deployment_id"] == deployment["id"]
    assert fired[0]["state_type"] == "COMPLETED", serve_log.read_text()[-3000:]
    with Store.open(settings.database_url, read_only=True) as store:
        first = store.rounds()[0]
    assert first.state == "finished"
    assert first.summary is not None
    assert first.summary["n_evaluated"] == 2
    with open_workspace(settings) as workspace:
        assert workspace.store.counts()["evaluations"] >= 2


def fired_runs(api: str) -> list[dict[str, Any]]:
    """Runs that the schedule made (nobody asked for them) and that have ended."""
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    runs = ask(f"{api}/flow_runs/filter", {"flow_runs": ended, "sort": "EXPECTED_START_TIME_ASC"})
    return [run for run in runs if run["auto_scheduled"]]
