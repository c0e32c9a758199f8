"""Telling people how far a stage is; a stage calls `Progress` and does not know who listens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Listener(Protocol):
    """Hears about stages."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator["Counter"]:
        """Hear that a stage of `total` units begins; the counter is called as they are done."""
        ...

    def say(self, line: str) -> None:
        """Hear one line for people."""
        ...


class Counter(Protocol):
    """Counts what a stage has done."""

    def __call__(self, n: int = 1) -> None:
        """Count n more."""
        ...


class Silent:
    """Listens to nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Counter]:  # noqa: ARG002 - the protocol's
        """Pass over a stage."""
        yield _ignore

    def say(self, line: str) -> None:
        """Pass over a line."""


def _ignore(n: int = 1) -> None:
    """Count nothing."""
    del n


class Bars:
    """Shows a bar a stage on a terminal, and a line when a stage begins elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = ""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Counter]:
        """Show a bar until the stage is done."""
        if not self.console.is_terminal and name != self._last:  # a stage in several shards is one to people
            self.say(f"{name} ...")
        self._last = name
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=total, unit=unit)

            def count(n: int = 1) -> None:
                bars.advance(task, n)

            yield count

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
