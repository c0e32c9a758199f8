"""What a training leaves beside its weights: a line of JSON for every epoch of every member, and a picture of the errors."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

from gnome.atomic_write import atomic_write
from gnome.models.training import EpochRecord

Line = dict[str, Any]


class TrainingLog:
    """Lines are added as epochs end; an interrupted run that goes on adds to what is there, and in the end each epoch has one line."""

    def __init__(self, out: Path) -> None:
        """Name the files beside the weights `out`."""
        self.path, self.picture = out.with_suffix(".log.jsonl"), out.with_suffix(".curves.svg")
        self.before = out.with_suffix(".log-before.jsonl")

    def is_ours(self) -> bool:
        """Whether there is no file, or one that begins as a log does."""
        if not self.path.exists():
            return True
        try:
            with self.path.open(encoding="utf-8") as file:
                first = json.loads(file.readline(10_000) or '{"member": 0, "epoch": 0}')
        except ValueError:
            return False
        return isinstance(first, dict) and {"member", "epoch"} <= set(first)

    def begin(self) -> None:
        """Begin anew; not for a run that goes on.  The log of the weights that are there is kept until those are replaced."""
        if self.before.exists():  # what is there is of a run that ended before its first save
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self.path.replace(self.before)

    def add(self, member: int, record: EpochRecord) -> None:
        """Add an epoch of a member, on a line of its own even where a kill cut the last one short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
            cut = file.read(1) not in {b"", b"\n"}
            file.write(("\n" * cut + json.dumps({"member": member, **asdict(record)}) + "\n").encode())

    def finish(self, members: int, epochs: int) -> None:
        """Put the lines of the run in order, each epoch once, and draw them."""
        lines = {(line["member"], line["epoch"]): line for line in self._lines()}
        ordered = [lines[key] for key in sorted(lines) if key[0] < members and key[1] <= epochs]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in ordered))
        self.before.unlink(missing_ok=True)
        if ordered:
            _draw(ordered, self.picture)

    def _lines(self) -> list[Line]:
        found = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # cut short by a kill; the epoch is trained again
                continue
            if _is_record(line):
                found.append(line)
        return found


def _is_record(line: Any) -> bool:
    """Whether a line says what this class writes, as those do not that others have added."""
    kinds = {"member": int, "epoch": int, "train_mae": float, "validation_mae": float}
    return isinstance(line, dict) and all(type(line.get(name)) is kind for name, kind in kinds.items())


def _draw(lines: Sequence[Line], path: Path) -> None:
    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - the backend is chosen first
    from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(6, 4.2))
    members = sorted({line["member"] for line in lines})
    for name, colour, label in (("train_mae", "#c2571a", "training"), ("validation_mae", "#1f5fa8", "validation")):
        for member in members:
            own = [line for line in lines if line["member"] == member]
            errors = [1000 * line[name] for line in own]
            axis.plot(
                [line["epoch"] for line in own], errors, color=colour, linewidth=1, label=label if member == members[0] else None
            )
    axis.set(yscale="log", xlabel="epoch", ylabel="mean absolute error, meV/atom", title=f"{len(members)} members")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.grid(visible=True, which="both", linewidth=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
