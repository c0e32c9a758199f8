"""Answers from a table: evaluations that were made elsewhere, at another time.

The table is a file of JSON lines, one evaluation each as `evaluation_to_dict` spells it, or a shard of relaxed crystals with columns `id`,
`energy_per_atom` and `e_form_per_atom`.  It is keyed by the content hash (`Crystal.id`) of the crystal that was handed in, and read again
whenever it has changed, so whoever computes the answers appends to it and they are there at the next `collect`.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

from dft_stub.evaluator import Evaluation, Failure
from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard
from gnome.crystals.validity import DEFAULT_GATE, GateSettings
from gnome.errors import EvaluatorUnavailable, InvalidCrystal, InvalidInput
from gnome.quantities import Quantity
from gnome.stability.method import Method


class RecordedEvaluator:
    """Looks crystals up in a file; implements `dft_stub.evaluator.Evaluator`.

    With `wait`, crystals without an answer stay pending; without, they are answered as `NO_ANSWER`.
    Raises EvaluatorUnavailable when the file is missing, empty, or mixes methods; a torn last line is left for later.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self._path, self._wait = path, wait
        self._stamp: tuple[int, int] | None = None
        self._answers: dict[str, Evaluation] = {}
        self._read()
        if not self._answers:
            raise EvaluatorUnavailable(f"{path}: holds no evaluation")
        self._method = next(iter(self._answers.values())).method
        self._tickets = itertools.count(1)
        self._pending: dict[str, dict[str, Crystal]] = {}

    @property
    def name(self) -> str:
        """`recorded`."""
        return "recorded"

    @property
    def method(self) -> Method:
        """The method of the recorded evaluations."""
        return self._method

    @property
    def elements(self) -> frozenset[int]:
        """Elements of the crystals in the table."""
        crystals = (evaluation.crystal for evaluation in self._answers.values())
        return frozenset(z for crystal in crystals if crystal is not None for z in crystal.composition)

    @property
    def gate(self) -> GateSettings:
        """The usual one."""
        return DEFAULT_GATE

    @property
    def computes(self) -> bool:
        """No: what is on record stays as it is."""
        return False

    def submit(self, crystals: Mapping[str, Crystal]) -> str:
        """Note what is asked."""
        ticket = f"{self.name}-{next(self._tickets)}"
        self._pending[ticket] = dict(crystals)
        return ticket

    def collect(self, ticket: str) -> Iterator[Evaluation]:
        """Yield what the file answers by now."""
        if ticket not in self._pending:
            raise EvaluatorUnavailable(f"no ticket {ticket!r} is open with {self.name}")
        self._read()
        for name, crystal in list(self._pending[ticket].items()):
            answer = self._answers.get(crystal.id)
            if answer is None and self._wait:
                continue
            del self._pending[ticket][name]
            yield self._no_answer(name, crystal) if answer is None else replace(answer, id=name)

    def pending(self, ticket: str) -> frozenset[str]:
        """Ids without an answer so far."""
        return frozenset(self._pending.get(ticket, ()))

    def close(self) -> None:
        """Nothing is kept open."""

    def _no_answer(self, name: str, crystal: Crystal) -> Evaluation:
        message = f"{crystal.reduced_formula}: {self._path} has no answer for {crystal.id}"
        return Evaluation(id=name, method=self.method, converged=False, failure=Failure.NO_ANSWER, message=message)

    def _read(self) -> None:
        try:
            status = self._path.stat()
        except OSError as error:
            raise EvaluatorUnavailable(f"{self._path}: cannot be read ({error})") from None
        if not S_ISREG(status.st_mode):
            raise EvaluatorUnavailable(f"{self._path}: cannot be read (no file)")
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp == self._stamp:
            return
        answers = list(_shard(self._path) if self._path.suffix == ".parquet" else _lines(self._path))
        labels = {evaluation.method.label for _, evaluation in answers}
        if len(labels) > 1:
            raise EvaluatorUnavailable(f"{self._path}: holds several methods ({', '.join(sorted(labels))}); keep one a file")
        self._answers, self._stamp = _one_each(self._path, answers), stamp


def evaluation_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain fields, for JSON."""
    plain = {entry.name: getattr(evaluation, entry.name) for entry in fields(evaluation)}
    crystal = None if evaluation.crystal is None else evaluation.crystal.to_dict()
    return {**plain, "method": evaluation.method.to_dict(), "crystal": crystal, "extra": dict(evaluation.extra)}


def evaluation_from_dict(record: Mapping[str, Any]) -> Evaluation:
    """Rebuild what `evaluation_to_dict` gave; raises InvalidInput when it is something else."""
    try:
        failure, crystal = record.get("failure"), record.get("crystal")
        if not isinstance(record["converged"], bool) or not isinstance(record["id"], str):
            raise InvalidInput(f"converged is {record['converged']!r} and id {record['id']!r}, expected true or false and a text")
        answered = all(record.get(name) is not None for name in ("crystal", "energy_per_atom", "e_form_per_atom"))
        if bool(record["converged"]) != (failure is None) or (failure is None and not answered):
            raise InvalidInput("converged goes with a crystal, energy_per_atom and e_form_per_atom, anything else with a failure")
        return Evaluation(
            **{
                **record,
                "method": Method.from_dict(record["method"]),
                "crystal": None if crystal is None else Crystal.from_dict(crystal),
                "failure": None if failure is None else Failure(failure),
            }
        )
    except (KeyError, TypeError, ValueError, InvalidCrystal) as error:
        raise InvalidInput(f"not a record of an evaluation: {error}") from None


_AGREE = 1e-3
"""eV/atom: relaxations of one crystal on two machines differ by less."""


def _disagree(first: Evaluation, second: Evaluation) -> bool:
    one, other = first.energy_per_atom, second.energy_per_atom
    return first.converged and second.converged and one is not None and other is not None and abs(one - other) > _AGREE


def _one_each(path: Path, answers: Iterable[tuple[str, Evaluation]]) -> dict[str, Evaluation]:
    """The last answer for each crystal; raises EvaluatorUnavailable for energies that disagree: nobody knows which is right."""
    found: dict[str, Evaluation] = {}
    for identifier, answer in answers:
        before = found.get(identifier)
        if before is not None and _disagree(before, answer):
            raise EvaluatorUnavailable(
                f"{path}: two energies of {identifier}, {before.energy_per_atom} and {answer.energy_per_atom} eV/atom; keep one"
            )
        found[identifier] = answer
    return found


def _lines(path: Path) -> Iterator[tuple[str, Evaluation]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise EvaluatorUnavailable(f"{path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            evaluation = evaluation_from_dict(json.loads(line))
        except (ValueError, RecursionError, InvalidInput, AttributeError) as error:
            if number == len(lines):  # no newline yet: still being written
                return
            raise EvaluatorUnavailable(f"{path}, line {number}: {error}") from None
        yield evaluation.id, evaluation


def _shard(path: Path) -> Iterator[tuple[str, Evaluation]]:
    try:
        crystals, columns, metadata = read_shard(path)
        method = Method.from_dict(metadata["method"])
        rows = zip(
            crystals, *(columns[key] for key in (Quantity.ID, Quantity.ENERGY_PER_ATOM, Quantity.E_FORM_PER_ATOM)), strict=True
        )
    except (InvalidInput, KeyError, TypeError) as error:
        raise EvaluatorUnavailable(f"{path}: not a shard of evaluations ({error})") from None
    for crystal, name, energy, e_form in rows:
        yield (
            name,
            Evaluation(id=name, method=method, converged=True, crystal=crystal, energy_per_atom=energy, e_form_per_atom=e_form),
        )
