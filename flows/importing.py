"""Known crystals from files into the database."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dft_stub.evaluator import Evaluation
from flows.assess import crystal_record, update_hull
from flows.energy_rows import has_energy, with_energy_under
from flows.evaluating import answers
from flows.importing_energies import Imported, import_energies, without_energy
from flows.plurals import counted
from flows.workspace import Workspace
from gnome.crystals.crystal import Crystal
from gnome.crystals.energy_fields import ALIASES, is_formation, unread_energies
from gnome.crystals.formats import ReadCrystal, ReadItem, Refusal, read_crystals
from gnome.crystals.identity import keys_to_search, same_crystal
from gnome.database.leases import hold_round, round_holder
from gnome.database.records import CrystalRecord
from gnome.errors import InvalidCrystal, InvalidInput, RoundBusy
from gnome.quantities import STABLE_TOLERANCE, Quantity
from gnome.stability.method import Method


def import_crystals(
    workspace: Workspace, *sources: Path, method_name: str = "", energy_key: str = "", run_type: str = "", relax: bool = False
) -> Imported:
    """Import every crystal of files and folders; what cannot be used is reported, the rest goes in.

    Crystals that come with energies join the hull of the method named (`importing_energies`), others are relaxed by the workspace's
    evaluator.  `energy_key`: a field that holds the total energy, eV per cell (per atom where its name ends so), in place of `energy`;
    `run_type`: the one to take of several; `relax`: leave energies aside.  Raises InvalidInput, with nothing imported, where a source is
    missing.
    """
    _check_sources(sources)
    if relax and (method_name or energy_key or run_type):
        raise InvalidInput("--relax leaves the files' energies aside; it does not go with --method, --energy-key or --run-type")
    if (energy_key or run_type) and not method_name:
        option = f"--energy-key {energy_key}" if energy_key else f"--run-type {run_type}"
        raise InvalidInput(f"{option}: goes with energies that are imported; name their method with --method")
    _refuse_open_round(workspace)  # before the reading, which may take long; once more when no round can begin
    good, refused = _read(sources, energy_key)
    with_energy = [] if relax else [item for item in good if has_energy(item)]
    where = ", ".join(map(str, sources))
    if with_energy and not method_name:
        raise InvalidInput(
            f"{where}: {counted(len(with_energy), 'crystal')} with energies; name their method with --method, or relax the crystals with "
            "--relax"
        )
    notes: list[str] = []
    unread = Counter(name for item in good if not (relax or has_energy(item)) for name in unread_energies(item.fields))
    if with_energy:
        refused += [without_energy(item) for item in good if not has_energy(item)]
    elif method_name and good:
        raise InvalidInput(_no_energies(where, method_name, len(good), unread, energy_key))
    elif unread:
        notes.append(
            f"{_counted(unread)}: not read as energies; these crystals are relaxed instead. To import them with such an energy: "
            f"--method NAME {_advice(unread)}"
        )
        workspace.listener.say(notes[0])  # before hours of work
    with hold_round(workspace.store):
        _refuse_open_round(workspace)
        if method_name and not good:
            done = Imported(n_imported=0, n_known=0, refused=tuple(refused), method=method_name)
        elif with_energy:
            done = import_energies(workspace, with_energy, refused, method_name, run_type)
        else:
            done = _import_structures(workspace, good, refused)
    for note in done.notes:
        workspace.listener.say(note)
    return replace(done, notes=(*notes, *done.notes))


def _check_sources(sources: Sequence[Path]) -> None:
    """Refuse all before the work where one is missing."""
    if missing := [str(source) for source in sources if not source.exists()]:
        others = "; nothing was imported" if len(sources) > 1 else ""
        raise InvalidInput(f"{', '.join(missing)}: no such file or folder{others}")


def _read(sources: Sequence[Path], energy_key: str) -> tuple[list[ReadCrystal], list[Refusal]]:
    """Read all sources; of several, one that is an empty folder costs itself."""
    good: list[ReadCrystal] = []
    refused: list[Refusal] = []
    for source in sources:
        try:
            for item in read_crystals(source):
                one = _with_energy(item, energy_key) if energy_key else item
                (refused if isinstance(one, Refusal) else good).append(one)  # type: ignore[arg-type]
        except InvalidInput as error:
            if len(sources) == 1:
                raise
            refused.append(Refusal(label=str(source), reason="empty", message=str(error)))
    return good, refused


def _with_energy(item: ReadItem, key: str) -> ReadItem:
    """Take the total energy of a crystal from the field named, or refuse it."""
    if isinstance(item, Refusal):
        return item
    try:
        return with_energy_under(item, key)
    except InvalidCrystal as error:
        return Refusal(label=item.label, reason=error.reason, message=str(error))


def _no_energies(where: str, method_name: str, n: int, unread: Counter[str], energy_key: str) -> str:
    asked = f" under {energy_key!r}" if energy_key else ""
    there = f" There is {_counted(unread)}: {_advice(unread)}." if unread else ""
    return (
        f"{where}: --method {method_name!r} names the method of energies, and of {counted(n, 'crystal')} none comes with "
        f"one{asked}; leave it out to relax them.{there}"
    )


def _counted(unread: Counter[str]) -> str:
    return ", ".join(f"{name} ({counted(n, 'crystal')})" for name, n in unread.most_common(5))


def _advice(unread: Counter[str]) -> str:
    """Say what to do about energies under names that nothing reads."""
    total = next((name for name, _ in unread.most_common() if not is_formation(name)), None)
    if total is None:
        return (
            f"formation energies are read from {' and '.join((*ALIASES, Quantity.E_FORM_PER_ATOM))} (eV/atom); rename the field"
        )
    return f"--energy-key {total} if that is the total energy (eV per cell, or per atom where the name ends so)"


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
    lower: dict[str, float] = {}
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
                if len(record.crystal.composition) == 1 and record.e_form_per_atom < -STABLE_TOLERANCE:
                    formula = record.crystal.reduced_formula
                    lower[formula] = min(record.e_form_per_atom, lower.get(formula, 0.0))
                n_imported += workspace.store.add_crystals([record])
                changed.append(record.crystal)
    update_hull(workspace.store, method.label, changed=changed)
    notes = tuple(
        f"{formula}: {-e_form:.3f} eV/atom below the reference of the element under {method.label}; the references stay as they are"
        for formula, e_form in sorted(lower.items())
    )
    return Imported(n_imported=n_imported, n_known=n_known, refused=tuple(refused), method=method.label, notes=notes)


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


def _source(item: ReadCrystal) -> str:
    """Name an imported crystal by its file and its content before relaxation."""
    return f"{item.label} ({item.crystal.id})"


def _has_twin(workspace: Workspace, evaluation: Evaluation, method: str) -> bool:
    crystal: Crystal | None = evaluation.crystal
    if crystal is None:
        return False
    found = workspace.store.crystals_by_fingerprint(keys_to_search(crystal), method)
    return any(same_crystal(crystal, other.crystal) for others in found.values() for other in others)
