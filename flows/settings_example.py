"""A commented `gnome.toml`: every setting with its meaning, as `gnome doctor --settings` prints it."""

import json
from collections.abc import Mapping
from typing import Any, Final

from flows.settings import Settings

MEANINGS: Final[Mapping[str, str]] = {
    "database_url": "The database: sqlite:///PATH (four slashes for an absolute path) or postgresql://USER@HOST/NAME; "
    "a file in your data folder when not given.",
    "folder": "Where models and references are kept; beside a SQLite database, under its name, when not given.",
    "evaluator": "What relaxes crystals where a command names none: chgnet, emt, gpaw, recorded:FILE ...",
    "device": "Where networks run: cpu, cuda, or auto for a GPU if there is one.",
    "workers": "Evaluations at the same time, each in a process of its own.",
    "evaluation_seconds": "An evaluation that takes longer is ended and counts as failed.",
    "evaluation_memory_gb": "The same for its memory.",
}
"""What each setting is for."""

_EXAMPLES: Final[Mapping[str, Any]] = {"database_url": "sqlite:///gnome.db", "folder": "gnome.files"}


def example_toml() -> str:
    """Write a `gnome.toml` with every setting, commented out at its default; where that depends on others, at an example."""
    lines = [
        "# gnome.toml: settings of the folder in which gnome is started. Remove the # in front of what you change.",
        "# A variable GNOME_... of the environment, GNOME_WORKERS for workers, goes first; an option of a command before both.",
    ]
    for name, field in Settings.model_fields.items():
        value = _EXAMPLES.get(name, field.get_default(call_default_factory=True))
        lines += ["", f"# {MEANINGS[name]}", f"# {name} = {json.dumps(value)}"]
    return "\n".join(lines) + "\n"
