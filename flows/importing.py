"""Known crystals from files into the database."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dft_stub.evaluator import Evaluation
from flows.assess import crystal_record, update_hull
from flows.evaluating import answers
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formats import ReadCrystal, Refusal, read_crystals
from gnome.crystals.identity import keys_to_search, same_crystal
from gnome.database.leases import hold_round, round_holder
from gnome.database.records import CrystalRecord
from gnome.errors import EvaluatorUnavailable, InvalidInput, RoundBusy
from gnome.quantities import Quantity
from gnome.stability.method import Method
from gnome.stability.references import ElementalReferences


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came of an import; `method` labels the hull that the crystals joined."""

    n_imported: int
    n_known: int
    refused: tuple[Refusal, ...]
    method: str


def import_crystals(workspace: Workspace, source: Path, *, method_name: str = "") -> Imported:
    """Import every crystal of a file or folder; what cannot be used is reported, the rest goes in.

    Crystals that all come with energies join the hull of the method named; its elemental references are the lowest entry of each
    element among them and those imported under it before.  Crystals without energies are relaxed by the workspace's evaluator.
    """
    _refuse_open_round(workspace)  # before the reading, which may take long; once more when no round can begin
    good: list[ReadCrystal] = []
    refused: list[Refusal] = []
    for item in read_crystals(source):
        if isinstance(item, Refusal):
            refused.append(item)
        else:
            good.append(item)
    with_energy = [item for item in good if _energy(item) is not None]
    if with_energy and not method_name:
        raise InvalidInput(f"{source}: {len(with_energy)} crystals come with energies; name their method with --method")
    if with_energy:
        refused += [
            Refusal(label=item.label, reason="no_energy", message="no energy, where others of this import have one")
            for item in good
            if _energy(item) is None
        ]
    elif method_name and good:
        raise InvalidInput(
            f"{source}: --method {method_name!r} names the method of energies, and none of {len(good)} crystals comes with one; "
            "leave it out to relax them"
        )
    with hold_round(workspace.store):
        _refuse_open_round(workspace)
        if with_energy:
            return _import_energies(workspace, with_energy, refused, method_name)
        return _import_structures(workspace, good, refused)


def _refuse_open_round(workspace: Workspace) -> None:
    unfinished = workspace.store.open_round()
    if unfinished is not None and (holder := round_holder(workspace.store)):
        raise RoundBusy(
            f"round {unfinished.number} is being run by process {holder}, and an import would change what it works on; wait for it, "
            "or use another database"
        )
    if unfinished is not None:
        raise RoundBusy(
            f"round {unfinished.number} is unfinished, and an import would change what it works on; finish it with `gnome discover`, "
            "or give it up with `gnome campaign abandon`"
        )


def _import_energies(workspace: Workspace, items: Sequence[ReadCrystal], refused: list[Refusal], name: str) -> Imported:
    method = Method(code="imported", functional=name)
    lowest: dict[str, ReadCrystal] = {}
    for item in sorted(items, key=lambda item: (_energy(item) or 0.0) + _correction(item), reverse=True):
        lowest[item.crystal.id] = item
    n_same = len(items) - len(lowest)
    items = [item for item in items if lowest[item.crystal.id] is item]
    before = _references(workspace, (), method)
    references = _references(workspace, items, method)
    if moved := sorted(z for z, energy in before.energies.items() if references.energies[z] < energy - 1e-9):
        raise InvalidInput(
            f"{', '.join(SYMBOLS[z] for z in moved)}: this import holds a lower form of the element than those under {name!r} "
            "before, whose formation energies would all change; import everything again under another --method"
        )
    records = []
    for item in items:
        energy, correction = _energy(item) or 0.0, _correction(item)
        try:
            e_form = references.formation_energy_per_atom(item.crystal.composition, energy, correction)
            records.append(
                crystal_record(
                    item.crystal,
                    method,
                    e_form_per_atom=e_form,
                    energy_per_atom=energy,
                    correction_per_atom=correction,
                    origin="imported",
                    source=item.label,
                )
            )
        except EvaluatorUnavailable as error:
            refused.append(Refusal(label=item.label, reason="no_reference", message=str(error)))
        except InvalidInput as error:
            refused.append(Refusal(label=item.label, reason="implausible", message=str(error)))
    n = workspace.store.add_crystals(records)
    update_hull(workspace.store, method.label)
    return Imported(n_imported=n, n_known=len(records) - n + n_same, refused=tuple(refused), method=method.label)


def _references(workspace: Workspace, items: Iterable[ReadCrystal], method: Method) -> ElementalReferences:
    lowest: dict[int, float] = {}
    elements = [
        (stored.crystal, stored.row["energy_per_atom"] + stored.row["correction_per_atom"])
        for stored in workspace.store.crystals_of(method.label)
        if stored.row["energy_per_atom"] is not None
    ]
    elements += [(item.crystal, (_energy(item) or 0.0) + _correction(item)) for item in items]
    for crystal, energy in elements:
        if len(crystal.composition) == 1:
            (z,) = crystal.composition
            lowest[z] = min(energy, lowest.get(z, float("inf")))
    return ElementalReferences(method=method.label, energies=lowest)


def _import_structures(workspace: Workspace, items: Sequence[ReadCrystal], refused: list[Refusal]) -> Imported:
    """Relax and store as answers come, so that an interrupted import goes on where it stopped."""
    evaluator = workspace.evaluator
    method = evaluator.method
    done, changed = set(), []
    for stored in workspace.store.crystals_of(method.label):
        done.add(stored.row["source"])
        if stored.row[Quantity.E_ABOVE_HULL] is None:  # an import was interrupted before it placed this one
            changed.append(stored.crystal)
    waiting: dict[str, ReadCrystal] = {}
    n_known = 0
    for item in items:
        if _source(item) in done or item.crystal.id in waiting:
            n_known += 1
        else:
            waiting[item.crystal.id] = item
    n_imported = 0
    with workspace.listener.stage("relaxing", len(waiting), "crystals") as count:
        for evaluation in answers(evaluator, {identifier: item.crystal for identifier, item in waiting.items()}):
            count()
            item = waiting[evaluation.id]
            if not evaluation.converged:
                refused.append(Refusal(label=item.label, reason=str(evaluation.failure), message=evaluation.message))
            elif _has_twin(workspace, evaluation, method.label):
                n_known += 1
            else:
                record = _imported(evaluation, method, _source(item))
                n_imported += workspace.store.add_crystals([record])
                changed.append(record.crystal)
    update_hull(workspace.store, method.label, changed=changed)
    return Imported(n_imported=n_imported, n_known=n_known, refused=tuple(refused), method=method.label)


def _imported(evaluation: Evaluation, method: Method, source: str) -> CrystalRecord:
    assert evaluation.crystal is not None and evaluation.e_form_per_atom is not None  # noqa: S101, PT018 - it converged
    return crystal_record(
        evaluation.crystal,
        method,
        e_form_per_atom=evaluation.e_form_per_atom,
        energy_per_atom=evaluation.energy_per_atom,
        correction_per_atom=evaluation.correction_per_atom,
        origin="imported",
        source=source,
    )


def _energy(item: ReadCrystal) -> float | None:
    value = item.fields.get(Quantity.ENERGY_PER_ATOM)
    return None if value is None else float(value)


def _correction(item: ReadCrystal) -> float:
    return float(item.fields.get(Quantity.CORRECTION_PER_ATOM) or 0.0)


def _source(item: ReadCrystal) -> str:
    """Name an imported crystal by its file and its content before relaxation."""
    return f"{item.label} ({item.crystal.id})"


def _has_twin(workspace: Workspace, evaluation: Evaluation, method: str) -> bool:
    crystal: Crystal | None = evaluation.crystal
    if crystal is None:
        return False
    found = workspace.store.crystals_by_fingerprint(keys_to_search(crystal), method)
    return any(same_crystal(crystal, other.crystal) for others in found.values() for other in others)
