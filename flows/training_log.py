"""What a training leaves beside its weights: a line of JSON for every epoch of every member, and a picture.

The picture shows the errors by epoch, and what the ensemble predicts for the validation set against its labels.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gnome.atomic_write import atomic_write
from gnome.models.training import EpochRecord

Line = dict[str, Any]

MOST_POINTS: Final = 3000
"""Points of the picture; more make a large file, and show no more."""


@dataclass(frozen=True)
class Parity:
    """Labels and what the ensemble predicts for them, eV/atom, (n,) each."""

    labels: NDArray[np.float64]
    predicted: NDArray[np.float64]


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

    def finish(self, members: int, epochs: int, parity: Parity | None = None) -> None:
        """Put the lines of the run in order, each epoch once, and draw them beside the predictions for the validation set."""
        lines = {(line["member"], line["epoch"]): line for line in self._lines()}
        ordered = [lines[key] for key in sorted(lines) if key[0] < members and key[1] <= epochs]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in ordered))
        self.before.unlink(missing_ok=True)
        if ordered:
            _draw(ordered, parity, self.picture)

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


def _draw(lines: Sequence[Line], parity: Parity | None, path: Path) -> None:
    """Draw without pyplot, whose backend and figures are the caller's own."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only a finished training draws

    figure = Figure(figsize=(6, 4.2) if parity is None else (10, 4.2), layout="constrained")
    axes = figure.subplots(1, 1 if parity is None else 2, squeeze=False)[0]
    _draw_errors(axes[0], lines)
    if parity is not None:
        _draw_parity(axes[1], parity)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_errors(axis: Any, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415

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


def _draw_parity(axis: Any, parity: Parity) -> None:
    known = np.isfinite(parity.labels) & np.isfinite(parity.predicted)
    labels, predicted = parity.labels[known], parity.predicted[known]
    if not len(labels):
        axis.set_axis_off()
        return
    few = slice(None, None, -(-len(labels) // MOST_POINTS))
    ends = [float(min(labels.min(), predicted.min())), float(max(labels.max(), predicted.max()))]
    axis.plot(ends, ends, color="0.5", linewidth=0.8)
    axis.scatter(labels[few], predicted[few], s=6, color="#1f5fa8", alpha=0.5, linewidths=0)
    error = 1000 * float(np.abs(predicted - labels).mean())
    axis.set(
        xlabel="label, eV/atom", ylabel="prediction of the ensemble, eV/atom", aspect="equal",
        title=f"validation: {len(labels)}, MAE {error:.3g} meV/atom",
    )  # fmt: skip
    axis.grid(visible=True, linewidth=0.3)
