"""How far a stage is, on a terminal and in a log."""

import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from flows.progress import Bars


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def log_of(script: "list[tuple[int, int, int]]", stop_at: int | None = None) -> list[str]:
    """Lines of a stage whose shards are (before, units, seconds a unit), 300 units in all."""
    clock, text = Clock(), io.StringIO()
    bars = Bars(Console(file=text, width=200), clock=clock)
    for before, total, seconds in script:
        with suppress(KeyboardInterrupt), bars.stage("first look", total, "candidates", before=before, whole=300) as count:
            for i in range(total):
                if before + i == stop_at:
                    raise KeyboardInterrupt
                clock.now += seconds
                count()
    return text.getvalue().splitlines()


def test_a_log_says_now_and_then_how_far_a_stage_is() -> None:
    assert log_of([(0, 100, 1), (100, 100, 0), (200, 100, 1)]) == [
        "first look ...",
        *(f"first look: {n} of 300 candidates" for n in range(15, 100, 15)),
        *(f"first look: {n} of 300 candidates" for n in range(215, 300, 15)),
        "first look: 300 candidates in 200 s",
    ], "not a line an item, nor one a shard"


def test_a_log_says_where_a_stage_stopped() -> None:
    assert log_of([(0, 100, 0), (100, 200, 0)], stop_at=140)[-1] == "first look: stopped at 140 of 300 candidates"


def on_screen(text: str) -> list[str]:
    """Lines that a terminal shows in the end."""
    screen = [""]
    for piece in re.split(r"(\n|\x1b\[2K|\x1b\[1A|\r)", text):
        if piece == "\n":
            screen.append("")
        elif piece == "\x1b[2K":
            screen[-1] = ""
        elif piece == "\x1b[1A":
            screen.pop()
        else:
            screen[-1] += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", piece)
    return [line for line in screen if line.strip()]


def shown(script: "list[tuple[int, int, int | None]]", whole: int | None = 300) -> list[str]:
    """What stands on a terminal in the end; shards are (before, units, where it stops), `whole` units in all."""
    text = io.StringIO()
    bars = Bars(Console(file=text, width=120, force_terminal=True, color_system=None), clock=Clock())
    for before, total, stop in script:
        with suppress(ZeroDivisionError), bars.stage("first look", total, "candidates", before=before, whole=whole) as count:
            count(total if stop is None else stop)
            if stop is not None:
                raise ZeroDivisionError
    return on_screen(text.getvalue())


def test_a_stage_in_shards_is_one_bar() -> None:
    (line,) = shown([(0, 100, None), (100, 100, None), (200, 100, None)])
    assert "300/300 candidates" in line


def test_a_bar_ends_where_the_stage_ended() -> None:
    (line,) = shown([(0, 100, None), (100, 200, 20)])
    assert "first look, stopped" in line
    assert "120/300 candidates" in line


@pytest.mark.parametrize("made", [0, 37])
def test_a_stage_that_made_less_than_it_might_have_is_whole(made: int) -> None:
    text = io.StringIO()
    bars = Bars(Console(file=text, width=120, force_terminal=True, color_system=None), clock=Clock())
    with bars.stage("proposing", 400, "candidates") as count:
        count(made)
    (line,) = on_screen(text.getvalue())
    assert f"{made}/{made} candidates" in line
