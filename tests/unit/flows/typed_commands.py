"""What comes of a command as a user types it."""

import json
from collections.abc import Callable
from typing import Any


class Outcome:
    """Exit code, and what was written."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Gnome = Callable[..., Outcome]


def failed(outcome: Outcome, code: int, *words: str) -> None:
    """Check that a command failed with one line on stderr, and nothing else."""
    assert outcome.code == code, outcome.err + outcome.out
    assert outcome.out == ""
    assert outcome.err.startswith("gnome: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


Run = Callable[..., Any]
"""Runs a command and parses its JSON."""

SMALL_TRAINING = ["--method", "made-up", "--members", "2", "--width", "16", "--epochs", "3", "--batch-size", "64"]
