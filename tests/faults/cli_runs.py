"""Running the program on a folder's database, and looking at what it left."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from emt_world import known_crystals

PROGRAM = [sys.executable, "-m", "flows.cli"]


ROOT = Path(__file__).resolve().parent.parent.parent


DISCOVER = ["discover", "--evaluator", "emt", "--candidates", "60", "--screened", "20"]


def start(folder: Path, *arguments: object, before: Callable[[], object] | None = None) -> "subprocess.Popen[str]":
    """Start the program on a folder's database; Ctrl-C reaches it even where the tests themselves ignore it."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if before is not None:
            before()

    environment = os.environ | {
        "GNOME_DATABASE_URL": f"sqlite:///{folder / 'gnome.db'}", "GNOME_EVALUATOR": "emt", "GNOME_WORKERS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=prepare,  # noqa: PLW1509 - these tests start no threads
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return process.returncode, out, err


def gnome(folder: Path, *arguments: object, before: Callable[[], object] | None = None) -> tuple[int, str, str]:
    return finish(start(folder, *arguments, before=before))


Here = Callable[..., tuple[int, str, str]]


def one_line(err: str) -> str:
    assert err.strip().startswith("gnome: "), err
    assert "\n" not in err.strip(), err
    return err


def count(folder: Path, sql: str) -> Any:
    with closing(sqlite3.connect(folder / "gnome.db", timeout=30)) as connection:
        return connection.execute(sql).fetchone()[0]


def wait_until(process: "subprocess.Popen[str]", true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


ELEMENTS = {symbol: crystal for symbol, crystal in known_crystals().items() if crystal.n_atoms == 1}
