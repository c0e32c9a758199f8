"""Formulas a second, one network on the CPU's cores or a GPU: ours beside GNoME's compositional network, in turns.

    python benchmarks/compositional_speed.py [--formulas 20000]

Random formulas of one to six elements, most of three or four as in CritExam; reading and packing them is counted.  Goals: 5,000 a second on
2 cores, a million on an H200.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from gpu_timing import conditions, print_table, write_row

from gnome.models.ensemble import CompositionalEnsemble, FormulaNetwork
from gnome.models.formula_graph import FormulaGraphSettings
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formulas", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(conditions(), f"{torch.get_num_threads()} threads")
    compositions = random_compositions(options.formulas)
    card = {"method": "random weights", "elements": list(range(1, 95))}
    ensembles = {}
    for name, settings in SETTINGS.items():
        network = untrained(settings).to(device).eval()
        if isinstance(network, FormulaNetwork):
            ensembles[name] = CompositionalEnsemble([network], card)
    times: dict[str, list[float]] = {name: [] for name in ensembles}
    for _ in range(options.turns + 1):  # the first warms up
        for name, ensemble in ensembles.items():
            began = time.perf_counter()
            ensemble.answers(compositions)
            times[name].append(time.perf_counter() - began)
    rows = []
    for name, own in times.items():
        speed = len(compositions) / float(np.median(own[1:]))
        parameters = sum(p.numel() for p in ensembles[name].members[0].parameters())
        rows.append((name, f"{parameters / 1e6:.2f}M", round(speed)))
        write_row("compositional_speed", arm=name, formulas_per_second=speed, device=device)
    print_table(("network", "parameters", "formulas a second"), rows)


if __name__ == "__main__":
    main()
