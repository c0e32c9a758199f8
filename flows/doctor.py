"""`gnome doctor`: looks at everything a round needs, and says of each whether it works or what to do."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flows.plurals import counted
from flows.settings import Settings
from gnome.errors import GnomeError, InvalidInput
from gnome.shipped import shipped_data

PACKAGES = ("gnome-discovery", "torch", "torch-geometric", "pymatgen", "ase", "prefect", "chgnet", "sqlalchemy")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do when it is not ok."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at versions, device, database, ensembles and evaluators."""
    findings: list[Finding] = []
    for check in (_packages, _settings, _device, _database, _ensembles, _evaluators, _programs):
        try:
            findings += check(settings)
        except Exception as error:
            findings.append(Finding(check.__name__.strip("_"), False, f"{type(error).__name__}: {error}", "report this"))
    return findings


def _packages(_: Settings) -> Iterator[Finding]:
    yield Finding("python", True, platform.python_version())
    for name in PACKAGES:
        try:
            yield Finding(name, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, "not installed", "install the package again: make discover sets it up")


def _settings(_: Settings) -> Iterator[Finding]:
    file = Path("gnome.toml").absolute()
    named = ", ".join(f"GNOME_{name.upper()}" for name in Settings.model_fields if f"GNOME_{name.upper()}" in os.environ)
    found = f"{file if file.exists() else 'no gnome.toml here'}; {named or 'no GNOME_... variable of ours'}"
    yield Finding("settings", True, found, "" if file.exists() else "gnome doctor --settings shows what one may hold")


def _device(settings: Settings) -> Iterator[Finding]:
    import torch  # noqa: PLC0415 - heavy

    from flows.device import device_of  # noqa: PLC0415 - heavy too

    try:
        device = device_of(settings)
    except InvalidInput as error:
        yield Finding("device", False, "no GPU", str(error))
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield Finding("device", True, f"{name}; evaluations use {settings.workers} worker processes")


def _database(settings: Settings) -> Iterator[Finding]:
    from gnome.database.engine import database_exists  # noqa: PLC0415 - after the packages were looked at
    from gnome.database.leases import unfinished_line  # noqa: PLC0415
    from gnome.database.store import Store  # noqa: PLC0415

    try:
        with Store.open(settings.database, read_only=True) as store:
            counts = store.counts()
            yield Finding(
                "database",
                True,
                f"{store.location}: {counted(counts['crystals'], 'crystal')}, {counted(counts['rounds'], 'round')}",
            )
            unfinished = store.open_round()
            if unfinished is not None:
                yield Finding("round", True, unfinished_line(store, unfinished.number))
    except GnomeError as error:
        fresh = not isinstance(error, InvalidInput) and not database_exists(settings.database)
        advice = "gnome discover makes it" if fresh else "set GNOME_DATABASE_URL, or mend what is said"
        yield Finding("database", fresh, str(error) if not fresh else "none yet", advice)


def _ensembles(settings: Settings) -> Iterator[Finding]:
    from flows.workspace import current_weights  # noqa: PLC0415 - imports torch
    from gnome.models.checkpoint import load_ensemble  # noqa: PLC0415 - imports torch

    for kind in ("structural", "compositional"):
        try:
            path = current_weights(settings, kind)
            _, card = load_ensemble(path)
            yield Finding(f"{kind} in use", True, f"{card['sha256'][:16]} on {card['method']}, {path}")
        except GnomeError as error:
            yield Finding(f"{kind} in use", False, str(error), "restore the file, or start with another database")
        path = shipped_data() / "ensembles" / f"{kind}.safetensors"
        try:
            members, card = load_ensemble(path)
            yield Finding(f"{kind} ensemble", True, f"{len(members)} members on {card['method']}, {card['sha256'][:16]}")
        except GnomeError as error:
            yield Finding(f"{kind} ensemble", False, str(error), "get the file again")


def _evaluators(settings: Settings) -> Iterator[Finding]:
    from flows.workspace import evaluator_of  # noqa: PLC0415 - imports CHGNet

    for name in dict.fromkeys(["chgnet", settings.evaluator]):
        try:
            evaluator = evaluator_of(settings, name)
            yield Finding(f"evaluator {name}", True, f"{evaluator.method.label}, {len(evaluator.elements)} elements")
        except GnomeError as error:
            yield Finding(f"evaluator {name}", False, str(error), "choose another with GNOME_EVALUATOR")


def _programs(_: Settings) -> Iterator[Finding]:
    from importlib.util import find_spec  # noqa: PLC0415

    from pipelines.buildcell import find_buildcell  # noqa: PLC0415

    found = find_buildcell()
    yield Finding("buildcell", True, str(found) if found else "not on the PATH; PyXtal makes the random structures")
    yield Finding("gpaw", True, version("gpaw") if find_spec("gpaw") else "not installed; needed for --evaluator gpaw only")
