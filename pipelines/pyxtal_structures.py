"""Random structures by PyXtal (Fredericks et al., Comput. Phys. Commun. 261, 107810 (2021)), in a process that can be killed."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import reduced_formula
from pipelines.line_worker import LineWorker, WorkerLost
from pipelines.random_structures import RandomSearch, RandomStructure, RandomStructureSettings

_START_LIMIT = 120.0
"""seconds: the worker imports PyXtal first, which takes long on a busy machine."""


class PyXtalStructures:
    """Random crystals with a random space group, drawn by PyXtal; a `RandomStructures`.

    One worker process is kept for all formulas.  `command` replaces it, for tests.  Use it in a `with` block or call `close`.
    """

    name = "pyxtal"
    is_reproducible = True

    def __init__(self, settings: RandomStructureSettings | None = None, *, command: Sequence[str] | None = None) -> None:
        """Remember the settings; the worker starts with the first search."""
        self.settings = settings or RandomStructureSettings()
        paths = os.pathsep.join(path for path in sys.path if path)
        self._worker = LineWorker(
            command or [sys.executable, "-m", "pipelines.pyxtal_worker"],
            memory_limit=self.settings.memory_limit,
            # One thread: draws are small, and address space is limited.
            environment={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._is_ready = False

    def search(self, composition: Mapping[int, int], *, n: int, seed: int) -> RandomSearch:
        """Make at most n structures of a reduced composition."""
        name = reduced_formula(composition)
        if not self.settings.formula_units(composition):
            total = sum(composition.values())
            return RandomSearch(structures=(), failures=(f"{name}: {total} atoms, the limit is {self.settings.max_atoms}",))
        found: list[RandomStructure] = []
        failures: list[str] = []
        lost = 0
        for index in range(n):
            question = {"composition": sorted(composition.items()), "seed": seed, "index": index}
            try:
                record = self._ask(question)
            except WorkerLost as loss:
                lost += 1
                failures.append(f"{name}, structure {index}: the generator {loss}")
                if lost >= self.settings.max_losses:
                    failures.append(f"{name}: given up after {lost} losses")
                    break
                continue
            if "crystal" in record:
                found.append(RandomStructure(**{**record, "crystal": Crystal.from_dict(record["crystal"])}))
            else:
                failures.append(f"{name}, structure {index}: nothing passed the gate in {self.settings.attempts} attempts")
        return RandomSearch(structures=tuple(found), failures=tuple(failures))

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if not self._is_ready:
                self._worker.ask(self.settings.to_dict(), time_limit=_START_LIMIT)
                self._is_ready = True
            return self._worker.ask(question, time_limit=self.settings.time_limit)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the worker; another search starts a new one."""
        self._worker.close()
        self._is_ready = False

    def __enter__(self) -> "PyXtalStructures":
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker."""
        self.close()
