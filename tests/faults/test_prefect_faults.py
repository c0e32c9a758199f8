"""Campaigns under Prefect when something is in the way: Ctrl-C, a kill, no server, a foreign folder of our packages' names."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_runs import ROOT, Here, count, finish, one_line, start, wait_until
from emt_world import copy_world, round_settings

CAMPAIGN = [
    "campaign", "run", "--rounds", "3", "--evaluator", "emt", "--candidates", "200", "--screened", "60", "--budget", "20",
]  # fmt: skip
WITHOUT_SERVER = "leave Prefect out with `--plain`"


def begun(folder: Path) -> bool:
    try:
        return bool(count(folder, "SELECT COUNT(*) FROM ledger WHERE state = 'done'"))
    except sqlite3.OperationalError:
        return False


def test_ctrl_c_ends_a_campaign_under_prefect_and_its_server_with_one_line(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    process = start(tmp_path, *CAMPAIGN, before=os.setsid)  # a group of its own, as the terminal gives it
    wait_until(process, lambda: begun(tmp_path))
    (server,) = [child for child in psutil.Process(process.pid).children() if "flows.prefect_server" in child.cmdline()]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group in the foreground
    code, _, err = finish(process)
    assert code == 130
    assert err.count("gnome: ") == 1
    assert "gnome: interrupted; what was kept is taken up" in err
    assert "Traceback" not in err
    assert "Crash" not in err
    assert not server.is_running()


def test_a_temporary_server_that_dies_in_the_middle_of_a_campaign_is_one_line(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    process = start(tmp_path, *CAMPAIGN)
    wait_until(process, lambda: begun(tmp_path))
    (server,) = [child for child in psutil.Process(process.pid).children() if "flows.prefect_server" in child.cmdline()]
    server.kill()
    code, _, err = finish(process)
    assert code == 1
    assert "Traceback" not in err
    assert err.count("gnome: ") == 1
    assert "fails (" in err
    assert WITHOUT_SERVER in err


def test_the_temporary_server_of_a_process_that_was_killed_ends_too(tmp_path: Path) -> None:
    """In a folder with a package of ours' name, which the server must not take."""
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise SystemExit('not ours')\n")
    program = "from flows.prefect_server import use_server\nwith use_server() as url: print(url, flush=True), input()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"http://127.0.0.1:")
        (server,) = psutil.Process(process.pid).children()
        assert os.getsid(server.pid) == os.getpgid(server.pid) == server.pid
        all_of_it = [server, *server.children(recursive=True)]
        assert len(all_of_it) == 2, "the guard and the server"
        process.kill()
        for one in all_of_it:
            one.wait(60)


@pytest.fixture
def prefect_settings() -> Iterator[Any]:
    """Change what Prefect was told by the environment."""
    from prefect.settings import temporary_settings

    @contextmanager
    def changed(**values: object) -> Iterator[None]:
        import prefect.settings

        with temporary_settings({getattr(prefect.settings, name): value for name, value in values.items()}):
            yield

    return changed  # type: ignore[return-value]


SCHEDULE = ("campaign", "schedule", "--cron", "0 3 * * *", "--evaluator", "emt")


@pytest.mark.parametrize("command", [CAMPAIGN, ("campaign", "resume"), SCHEDULE], ids=lambda command: command[1])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "PREFECT_API_URL=http://127.0.0.1:9/api does not answer"),
        ({"PREFECT_API_URL": "http://me:secret@127.0.0.1:9/api"}, "PREFECT_API_URL=http://...@127.0.0.1:9/api does not answer"),
        ({"PREFECT_API_URL": "no server"}, "PREFECT_API_URL=no server does not answer"),
        ({"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": 1}, "server did not answer within 1 s"),
        ({"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": False}, "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids"),
    ],
    ids=["dead", "dead with a password", "no URL", "slow", "forbidden"],
)
def test_prefect_without_a_server_is_one_line(
    here: Here,
    after_round: Path,
    tmp_path: Path,
    prefect_settings: Any,
    command: tuple[str, ...],
    settings: dict[str, Any],
    words: str,
) -> None:
    copy_world(after_round, tmp_path)
    with prefect_settings(**settings):
        code, out, err = here(tmp_path, *command)
    assert (code, out) == (1, "")
    assert words in one_line(err)
    assert "prefect server start" in err
    assert (WITHOUT_SERVER in err) == (command is not SCHEDULE), "a schedule needs Prefect"


def test_a_server_that_ends_in_the_middle_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from prefect.settings import PREFECT_API_URL

    from flows import prefect_server
    from gnome.errors import GnomeError

    monkeypatch.setattr(prefect_server, "_start", lambda **_: "http://127.0.0.1:9/api")
    with pytest.raises(GnomeError, match=r"127\.0\.0\.1:9/api fails .*refused.*--plain"), prefect_server.use_server() as url:  # noqa: PT012
        assert url == PREFECT_API_URL.value()
        httpx.get(url)


@pytest.mark.parametrize(
    ("cron", "problem"),
    [
        ("* * * * * *", "it has 6"), ("0 3 * * * 0", "it has 6"), ("0 3 * * * 0 2027", "it has 7"), ("0 3 * *", "it has 4"),
        ("", "it has 0"), ("0 25 * * *", "Invalid cron"), ("@reboot", "Invalid cron"), ("0 0 31 2 *", "failed to find next date"),
    ],
)  # fmt: skip
def test_a_schedule_that_is_none_is_refused(here: Here, tmp_path: Path, cron: str, problem: str) -> None:
    code, out, err = here(tmp_path, "campaign", "schedule", "--cron", cron)
    assert (code, out) == (2, "")
    assert f"--cron {cron!r} cannot be used ({problem}" in one_line(err)
    assert "five fields are expected, as in '0 3 * * *'" in err


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another checkout, that nothing is installed from, whose `flows` notes which processes import it."""
    for package in ("flows", "pipelines", "gnome", "dft_stub"):
        shutil.copytree(ROOT / package, tmp_path / "copy" / package, ignore=shutil.ignore_patterns("__pycache__", "_shipped"))
    with (tmp_path / "copy" / "flows" / "__init__.py").open("a") as file:
        file.write(f"\nimport os, pathlib\npathlib.Path({str(tmp_path)!r}, f'imported by {{os.getpid()}}').touch()\n")
    return tmp_path / "copy"


LOAD = """
import subprocess, sys
from flows.deployments import _neutral_folder
load = '''from prefect.flows import load_flow_from_entrypoint
flow = load_flow_from_entrypoint('flows.campaign.campaign_flow')
print(sys.modules[flow.fn.__module__].__file__, 'run_campaign' in flow.fn.__globals__)'''
with _neutral_folder(): subprocess.run([sys.executable, '-c', 'import sys; ' + load], check=True)
"""


def test_a_served_run_is_ours_where_a_folder_of_the_same_name_is(tmp_path: Path) -> None:
    for package in ("flows", "pipelines", "gnome"):
        (tmp_path / package).mkdir()
        for name in ("__init__", "campaign"):
            (tmp_path / package / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == [str(ROOT / "flows" / "campaign.py"), "True"], done.stderr


def test_what_a_checkout_starts_is_of_the_same_checkout(copy: Path) -> None:
    """Run where it stands, as `python -m flows` does, without being installed: the served run and the temporary server."""
    program = LOAD + "from flows.prefect_server import use_server\nwith use_server() as url: print(url, flush=True), input()\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=copy, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().decode().split() == [str(copy / "flows" / "campaign.py"), "True"]
        assert process.stdout.readline().startswith(b"http://127.0.0.1:")
        (guard,) = psutil.Process(process.pid).children()
        (server,) = guard.children()
        process.communicate(b"\n", timeout=60)
    assert (copy.parent / f"imported by {server.pid}").exists()
    assert not server.is_running()


@pytest.mark.parametrize("command", ["resume", "abandon"])
def test_what_goes_on_with_a_round_makes_no_database(here: Here, tmp_path: Path, command: str) -> None:
    code, out, err = here(tmp_path, "campaign", command)
    assert (code, out) == (2, "")
    assert "it has no round; start with `gnome campaign run`" in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_another_process_runs_is_not_called_interrupted(here: Here, after_round: Path, tmp_path: Path) -> None:
    """The parent of this process runs it, as far as the database knows."""
    from flows.stages import begin_round
    from flows.workspace import open_workspace
    from gnome.database.leases import acquire_round
    from gnome.database.owners import _start_of, this_process

    settings = copy_world(after_round, tmp_path)
    (tmp_path / "late.csv").write_text("cif\n")
    other = this_process().replace(f"{os.getpid()}@", f"{os.getppid()}@").partition("#")[0] + f"#{_start_of(os.getppid())}"
    with open_workspace(settings) as workspace:
        begin_round(workspace, round_settings())
        acquire_round(workspace.store, owner=other)
    commands: tuple[list[object], ...] = (
        ["discover"],
        ["import", tmp_path / "late.csv"],
        ["campaign", "run", "--plain"],
        ["campaign", "run", "--plain", "--evaluator", "recorded:other.parquet"],
        ["campaign", "resume", "--plain"],
        ["campaign", "abandon"],
    )
    for command in commands:
        code, out, err = here(tmp_path, *command)
        assert (code, out) == (1, ""), command
        assert f"process {os.getppid()}@" in one_line(err)
        assert "wait for it" in err
        assert "interrupted" not in err
        assert "gnome campaign abandon" not in err
    assert f"Round 2 is being run by process {os.getppid()}@" in here(tmp_path, "campaign", "status")[1]
    with closing(sqlite3.connect(tmp_path / "gnome.db")) as connection, connection:
        connection.execute("UPDATE leases SET owner = NULL")
    assert "Round 2 is unfinished; `gnome discover` goes on with it." in here(tmp_path, "campaign", "status")[1]
    assert "gnome campaign abandon" in here(tmp_path, "import", tmp_path / "late.csv")[2]
