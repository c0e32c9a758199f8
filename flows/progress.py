"""Telling people how far a stage is; a stage calls `Progress` and does not know who listens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES: Final = 15.0
"""Where no terminal shows bars, a stage says how far it is about that often."""


class Listener(Protocol):
    """Hears about stages."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str, *, before: int = 0, whole: int | None = None) -> Iterator["Counter"]:
        """Hear that a stage of `total` units begins; the counter is called as they are done.

        A shard of a stage says how many units of the `whole` are done `before` it.
        """
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
    def stage(
        self,
        name: str,  # noqa: ARG002 - the protocol's
        total: int,  # noqa: ARG002
        unit: str,  # noqa: ARG002
        *,
        before: int = 0,  # noqa: ARG002
        whole: int | None = None,  # noqa: ARG002
    ) -> Iterator[Counter]:
        """Pass over a stage."""
        yield _ignore

    def say(self, line: str) -> None:
        """Pass over a line."""


def _ignore(n: int = 1) -> None:
    """Count nothing."""
    del n


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Units `before` to `end` of the `whole` of a stage."""

    name: str
    unit: str
    before: int
    end: int
    whole: int

    @property
    def is_last(self) -> bool:
        return self.end >= self.whole


class Bars:
    """Shows a bar a stage on a terminal, however many shards it has; elsewhere lines: it begins, how far it is now and then, it ends."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._began: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str, *, before: int = 0, whole: int | None = None) -> Iterator[Counter]:
        """Show how far the stage is; what is stopped says so, and where."""
        stretch = _Stretch(
            name=name, unit=unit, before=before, end=before + total, whole=before + total if whole is None else whole
        )
        if before == 0 or name not in self._began:
            self._began[name] = self._clock()
        with (self._bar if self.console.is_terminal else self._lines)(stretch) as count:
            yield count

    @contextmanager
    def _bar(self, stretch: "_Stretch") -> Iterator[Counter]:
        """Show a bar that stands at what was counted; that of a shard before the last makes room for the next one's."""
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, get_time=self._clock) as bars:
            task = bars.add_task(stretch.name, total=stretch.whole, completed=stretch.before, unit=stretch.unit)
            bars.tasks[0].start_time = self._began[stretch.name]

            def count(n: int = 1) -> None:
                bars.advance(task, n)

            try:
                yield count
            except BaseException:
                bars.update(task, description=f"{stretch.name}, stopped", refresh=True)
                raise
            if stretch.is_last:  # what a stage makes may be less than the most it was to make
                bars.update(task, total=bars.tasks[0].completed, refresh=True)
            bars.live.transient = not stretch.is_last

    @contextmanager
    def _lines(self, stretch: "_Stretch") -> Iterator[Counter]:
        if stretch.before == 0:
            self.say(f"{stretch.name} ...")
        done, said = stretch.before, self._clock()

        def count(n: int = 1) -> None:
            nonlocal done, said
            done += n
            if self._clock() - said >= SECONDS_BETWEEN_LINES and done < stretch.end:
                said = self._clock()
                self.say(f"{stretch.name}: {done} of {stretch.whole} {stretch.unit}")

        try:
            yield count
        except BaseException:
            self.say(f"{stretch.name}: stopped at {done} of {stretch.whole} {stretch.unit}")
            raise
        if stretch.is_last:
            self.say(f"{stretch.name}: {done} {stretch.unit} in {self._clock() - self._began[stretch.name]:.0f} s")
        elif self._clock() - said >= SECONDS_BETWEEN_LINES:
            self.say(f"{stretch.name}: {done} of {stretch.whole} {stretch.unit}")

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
