"""Formulas a second, one network on the CPU's cores or a GPU: ours beside GNoME's compositional network, in turns.

    python benchmarks/compositional_speed.py [--formulas 20000]

Random formulas of one to six elements, most of three or four as in CritExam.  Packing of compositions, the same for all, is timed apart; a
network begins with packed arrays and ends with answers, both in the host's memory.  Goals: 5,000 a second on 2 cores, a million on an
H200.  On a GPU the networks are timed compiled too, in FP32 and in BF16, with the median change of an answered energy against FP32
as it is.
"""

import argparse
import time
from copy import deepcopy
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from gpu_timing import conditions, print_table, write_row

from gnome.models.formula_ensemble import CompositionalEnsemble, FormulaNetwork
from gnome.models.formula_graph import FormulaGraphSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.linear import Precision
from gnome.models.recipes import FORMULA_NETWORK, NetworkSettings, untrained

SETTINGS: dict[str, NetworkSettings] = {
    "ours, as shipped": FORMULA_NETWORK,
    "ours, depth 3, width 128": replace(FORMULA_NETWORK, depth=3, width=128, hidden=256),
    "GNoME's": FormulaGraphSettings(),
}
SHARES = (0.01, 0.2, 0.47, 0.25, 0.06, 0.01)
"""Of formulas with one to six elements."""


def random_compositions(n: int) -> list[dict[int, int]]:
    rng = np.random.default_rng(0)
    sizes = rng.choice(np.arange(1, 7), size=n, p=SHARES)
    return [
        dict(zip((rng.permutation(94)[:size] + 1).tolist(), rng.integers(1, 9, size).tolist(), strict=True)) for size in sizes
    ]


def ways(device: str) -> dict[str, tuple[CompositionalEnsemble, Precision]]:
    """Ensembles of one network, by name, each with the precision that it is run in."""
    card = {"method": "random weights", "elements": list(range(1, 95))}
    made: dict[str, tuple[CompositionalEnsemble, Precision]] = {}
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        network = cast(FormulaNetwork, untrained(settings).to(device).eval())
        made[name] = CompositionalEnsemble([network], card), "fp32"
        if device == "cuda":
            compiled = deepcopy(network)
            compiled.compile(dynamic=True)
            for precision in ("fp32", "bf16"):
                made[f"{name}, compiled, {precision}"] = CompositionalEnsemble([compiled], card), precision
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formulas", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(conditions(), f"{torch.get_num_threads()} threads")
    compositions = random_compositions(options.formulas)
    ensembles = ways(device)
    packing: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in ensembles}
    energies: dict[str, np.ndarray] = {}
    for turn in range(options.turns + 1):  # the first warms up
        began = time.perf_counter()
        packed = PackedFormulas.from_compositions(compositions)
        packing.append(time.perf_counter() - began)
        for name, (ensemble, precision) in ensembles.items():
            began = time.perf_counter()
            energies[name] = ensemble.member_answers(packed, precision=precision)[0, :, 0]
            times[name].append(time.perf_counter() - began)
            print(f"turn {turn}, {name}: {times[name][-1]:.2f} s", flush=True)
    n, pack = len(compositions), float(np.median(packing[1:]))
    rows = []
    for name, own_times in times.items():
        answer = float(np.median(own_times[1:]))
        parameters = sum(p.numel() for p in ensembles[name][0].members[0].parameters())
        plain = next(energies[other] for other in SETTINGS if name.startswith(other))
        change = float(np.median(np.abs(energies[name] - plain)))
        rows.append((name, f"{parameters / 1e6:.2f}M", f"{n / answer:,.0f}", f"{n / (answer + pack):,.0f}", f"{change:.1e}"))
        write_row("compositional_speed", arm=name, packed_per_second=n / answer, with_packing=n / (answer + pack), device=device)
    print(f"packing: {n / pack:,.0f} formulas a second on one core")
    print_table(("network", "parameters", "packed formulas a second", "with packing", "change, eV/atom"), rows)


if __name__ == "__main__":
    main()
