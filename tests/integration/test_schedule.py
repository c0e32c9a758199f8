"""A campaign that the command line deploys is fired by its cron schedule."""

import json
import os
import re
import signal
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
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 200.0  # seconds: a start, at most a minute to the next full one, and a round


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
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


def test_a_schedule_without_a_server_starts_one_that_fires(emt_world: Path, tmp_path: Path) -> None:
    """In a folder with packages of our names, none of which is ours."""
    settings = copy_world(emt_world, tmp_path / "world")
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PYTHONPATH": str(ROOT),
        "GNOME_DATABASE_URL": settings.database_url, "GNOME_WORKERS": "1",
    }  # fmt: skip
    log, here = tmp_path / "serve.log", tmp_path / "here"
    for package in ("flows", "pipelines", "dft_stub"):
        (here / package).mkdir(parents=True)
        (here / package / "__init__.py").write_text("raise SystemExit('not ours')\n")
    command = [
        sys.executable, "-P", "-m", "flows.cli", "campaign", "schedule", "--cron", "* * * * *", "--rounds", "1", "--name", "nightly",
        "--evaluator", "emt", "--candidates", "40", "--screened", "10", "--budget", "2",
    ]  # fmt: skip
    with running(command, log, environment, here) as serving:
        api = wait_for(lambda: re.search(r"a temporary Prefect server at (http://\S+/api)", log.read_text()), serving, log).group(
            1
        )
        fired = wait_for(lambda: fired_runs(api), serving, log)
        (deployment,) = ask(f"{api}/deployments/filter", {})
        os.killpg(serving.pid, signal.SIGINT)
        serving.wait(60)
    with pytest.raises(OSError, match="refused"):
        ask(f"{api}/health")
    assert (deployment["name"], deployment["entrypoint"]) == ("nightly", "flows.campaign.campaign_flow")
    assert deployment["parameters"]["folder"] == str(here)
    assert [schedule["schedule"]["cron"] for schedule in deployment["schedules"]] == ["* * * * *"]
    assert fired[0]["deployment_id"] == deployment["id"]
    assert fired[0]["state_type"] == "COMPLETED", log.read_text()[-3000:]
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
