"""Random structures by PyXtal (Fredericks et al., Comput. Phys. Commun. 261, 107810 (2021)), in a process that can be killed."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import reduced_formula
from gnome.processes import LineWorker, ProcessLost, python_command
from pipelines.random_structures import RandomSearch, RandomStructure, RandomStructureSettings

_START_LIMIT = 120.0
"""seconds: the worker imports PyXtal first, which takes long on a busy machine."""


class PyXtalStructures:
    """Random crystals with a random space group, drawn by PyXtal; a `RandomStructures`.

    The worker processes are kept for all formulas.  `command` replaces them, for tests.  Use it in a `with` block or call `close`.
    """

    name = "pyxtal"
    is_reproducible = True

    def __init__(
        self, settings: RandomStructureSettings | None = None, *, workers: int = 1, command: Sequence[str] | None = None
    ) -> None:
        """Remember the settings; the workers start with the first search."""
        self.settings = settings or RandomStructureSettings()
        command = command or python_command("pipelines.pyxtal_worker")
        self._workers = [_Worker(command, self.settings) for _ in range(workers)]

    def search(self, composition: Mapping[int, int], *, n: int, seed: int) -> RandomSearch:
        """Make at most n structures of a reduced composition."""
        name = reduced_formula(composition)
        if not self.settings.formula_units(composition):
            total = sum(composition.values())
            return RandomSearch(structures=(), failures=(f"{name}: {total} atoms, the limit is {self.settings.max_atoms}",))
        answers = self._ask_all([{"composition": sorted(composition.items()), "seed": seed, "index": i} for i in range(n)])
        found: list[RandomStructure] = []
        failures: list[str] = []
        for index, record in sorted(answers.items()):
            if isinstance(record, ProcessLost):
                failures.append(f"{name}, structure {index}: the generator {record}")
            elif "crystal" in record:
                found.append(RandomStructure(**{**record, "crystal": Crystal.from_dict(record["crystal"])}))
            else:
                failures.append(f"{name}, structure {index}: nothing passed the gate in {self.settings.attempts} attempts")
        lost = sum(isinstance(record, ProcessLost) for record in answers.values())
        if lost >= self.settings.max_losses:
            failures.append(f"{name}: given up after {lost} losses")
        return RandomSearch(structures=tuple(found), failures=tuple(failures))

    def _ask_all(self, questions: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any] | ProcessLost]:
        """Share questions out among the workers until all are answered or too many workers were lost; answers by index."""
        answers: dict[int, dict[str, Any] | ProcessLost] = {}
        waiting = iter(questions)  # each is taken by one thread: a list's iterator is safe under the interpreter's lock

        stopped = threading.Event()

        def serve(worker: _Worker) -> None:
            for question in waiting:
                if stopped.is_set():
                    return
                try:
                    answers[question["index"]] = worker.ask(question)
                except ProcessLost as loss:
                    answers[question["index"]] = loss
                if sum(isinstance(answer, ProcessLost) for answer in list(answers.values())) >= self.settings.max_losses:
                    return

        with ThreadPoolExecutor(len(self._workers)) as pool:
            served = [pool.submit(serve, worker) for worker in self._workers]
            try:
                for one in served:
                    one.result()
            except BaseException:  # of an interruption, too: what is being drawn is not waited for
                stopped.set()
                for worker in self._workers:
                    worker.kill()
                raise
        return answers

    def close(self) -> None:
        """End the workers; another search starts new ones."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "PyXtalStructures":
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        self.close()


class _Worker:
    """One process, which is told the settings before its first question."""

    def __init__(self, command: Sequence[str], settings: RandomStructureSettings) -> None:
        self._settings = settings
        self._line = LineWorker(command, memory_bytes=settings.memory_limit * 2**20)
        self._is_ready = False

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Ask one question; a process that is lost is started anew by the next."""
        try:
            if not self._is_ready:
                self._line.ask(self._settings.to_dict(), seconds=_START_LIMIT)
                self._is_ready = True
            return self._line.ask(question, seconds=self._settings.time_limit)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._line.close()
        self._is_ready = False

    def kill(self) -> None:
        """End the process from another thread; the thread that waits for its answer then meets its end."""
        self._line.kill()
