"""Hit rate of the filtered budget beside random candidates of the same generator, in one run.

    python benchmarks/discovery_hit_rate.py [--budget 100] [--generator structural] [--seed 0]

One round's candidates are proposed and screened; the filter's choice and a random choice (one structure a composition in both) are
evaluated by CHGNet against the same hull.  A hit converged to a crystal that is new and within 1 meV/atom of that hull, or below it.
Intervals are percentile bootstraps over evaluations (95 %); `novel ternaries` leaves out binary compositions, which the seeds cover best.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flows.assess import assess
from flows.evaluating import answers
from flows.records import candidate_from, evaluation_record, prediction_from
from flows.rounds import round_method
from flows.settings import RoundSettings, Settings
from flows.stages import STAGES, begin_round, n_shards, run_shard
from flows.workspace import Workspace, open_workspace
from gnome.database.records import EvaluationRecord
from gnome.models.metrics import Interval, bootstrap
from gnome.quantities import STABLE_TOLERANCE
from pipelines.candidate import Candidate
from pipelines.selection import RandomAcquisition, SelectionSettings, select


def choose(workspace: Workspace, number: int, budget: int, seed: int) -> dict[str, list[Candidate]]:
    """The filter's choice and a random one among all candidates of the round."""
    store = workspace.store
    everything = {record.id: candidate_from(record) for record in store.candidates_of_round(number)}
    predictions = [prediction_from(record, round_method(workspace, number)) for record in store.predictions_of_round(number)]
    filtered = select(predictions, [everything[p.candidate_id] for p in predictions], budget)
    draw = RandomAcquisition(seed=seed)
    unseen = [replace(predictions[0], candidate_id=identifier) for identifier in everything]  # of which only the id counts
    blind = select(unseen, list(everything.values()), budget, SelectionSettings(acquisition=draw))
    return {"filter": [one.candidate for one in filtered], "random": [one.candidate for one in blind]}


def evaluate(workspace: Workspace, number: int, arms: dict[str, list[Candidate]]) -> dict[str, list[EvaluationRecord]]:
    """Relax every candidate of both arms once."""
    wanted = {candidate.id: candidate.crystal for arm in arms.values() for candidate in arm}
    done = {}
    begin = time.perf_counter()
    for evaluation in answers(workspace.evaluator, wanted):
        done[evaluation.id] = evaluation_record(evaluation, number)
        if len(done) % 20 == 0:
            print(f"  {len(done)} of {len(wanted)} evaluated, {time.perf_counter() - begin:.0f} s", flush=True)
    return {name: [done[candidate.id] for candidate in arm] for name, arm in arms.items()}


def hits(workspace: Workspace, number: int, records: Sequence[EvaluationRecord]) -> np.ndarray:
    """1.0 for each evaluation that is a hit, each arm judged against the hull before the round."""
    hull = workspace.hull(round_method(workspace, number), before_round=number)
    assessed = {one.candidate_id: one for one in assess(workspace.store, records, hull, number).assessments}
    return np.array(
        [
            float(record.candidate_id in assessed and bool(assessed[record.candidate_id].novel)
                  and assessed[record.candidate_id].e_above_hull_before <= STABLE_TOLERANCE)
            for record in records
        ]
    )  # fmt: skip


def rate(values: np.ndarray) -> Interval:
    return bootstrap(lambda x: float(x.mean()), values, n_resamples=4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--generator", default="structural")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", default="")
    options = parser.parse_args()
    folder = tempfile.mkdtemp()
    settings = Settings(database_url=options.database or f"sqlite:///{folder}/gnome.db", folder=Path(folder))
    wanted = RoundSettings(generator=options.generator, budget=options.budget, seed=options.seed)
    with open_workspace(settings, evaluator="chgnet") as workspace:
        number = begin_round(workspace, wanted).number
        for stage in STAGES[: STAGES.index("select")]:
            for shard in range(n_shards(workspace, number, stage)):
                run_shard(workspace, number, stage, shard)
        arms = choose(workspace, number, options.budget, options.seed)
        records = evaluate(workspace, number, arms)
        found = {name: hits(workspace, number, arm) for name, arm in records.items()}
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores; generator {options.generator}, seed {options.seed}, hull of shipped seeds, CHGNet"
    )
    print(f"{'arm':<10} {'n':>5} {'converged':>10} {'hit rate':>22} {'novel ternaries':>24}")
    rows = []
    for name, values in found.items():
        ternary = np.array([len(candidate.crystal.composition) > 2 for candidate in arms[name]])
        converged = sum(record.converged for record in records[name])
        inner = rate(values[ternary]) if ternary.any() else None
        whole = rate(values)
        shown = f"{inner.value:.2f} [{inner.low:.2f}, {inner.high:.2f}] of {ternary.sum()}" if inner else "none"
        print(f"{name:<10} {len(values):>5} {converged:>10} {whole.value:>8.2f} [{whole.low:.2f}, {whole.high:.2f}] {shown:>26}")
        rows.append({"arm": name, "n": len(values), "converged": converged, "hit_rate": vars(whole)})
    n = min(map(len, found.values()))
    rng = np.random.default_rng(0)
    ratios = [
        found["filter"][rng.integers(0, n, n)].mean() / max(found["random"][rng.integers(0, n, n)].mean(), 1 / n)
        for _ in range(4000)
    ]
    low, high = np.percentile(ratios, [2.5, 97.5])
    print(f"filter over random: {found['filter'].mean() / max(found['random'].mean(), 1 / n):.1f} [{low:.1f}, {high:.1f}]")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
