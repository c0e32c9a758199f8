"""Draw what the gains of shaped attention do in training, from the runs that `transformer_language_model.py` kept.

    python benchmarks/transformer_gains.py RESULTS.jsonl docs/transformer_gains.svg [--size 30M] [--block sas] [--seed 0]

The run of the block's best learning rate is drawn: a panel for each gain, a line for each layer; over heads the mean is drawn
and, shaded, the range.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from transformer_language_model import at_best_rate

PANELS = {
    "alpha": r"$\alpha$, the identity's (heads)",
    "beta": r"$\beta$, attention's (heads)",
    "gamma": r"$\gamma$, the centre's (heads)",
    "attention": r"$b_\mathrm{SA}$, the sub-block's",
    "mlp": r"$b_\mathrm{FF}$, the MLP's",
    "skip": r"$a_\mathrm{FF}$, the MLP's skip",
}


def draw(row: dict[str, Any], path: Path) -> None:
    names = [name for name in PANELS if name in row["gains"][0][1]]
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(10, 5.6), sharex=True, squeeze=False)
    steps = [step for step, _ in row["gains"]]
    tokens = np.array(steps) * row["tokens"] / steps[-1] / 1e6
    depth = len(row["gains"][0][1]["alpha"])
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.92, depth))
    for axis, name in zip(axes.flat, names, strict=False):
        values = np.array([gains[name] for _, gains in row["gains"]])  # (marks, layers, heads or 1)
        for layer, colour in enumerate(colours):
            own = values[:, layer]
            axis.plot(tokens, own.mean(1), color=colour, label=f"layer {layer + 1}")
            axis.fill_between(tokens, own.min(1), own.max(1), color=colour, alpha=0.12, linewidth=0)
        axis.set_title(PANELS[name], fontsize=11)
        axis.axhline(0, color="#999", linewidth=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("million tokens")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7, ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", default="30M")
    parser.add_argument("--block", default="sas", choices=("sas", "sasp"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    row = next((row for row in at_best_rate(rows, options.size, options.block) if row["seed"] == options.seed), None)
    if row is None:
        raise SystemExit(
            f"{options.results} holds no run of {options.block}, {options.size}, seed {options.seed}, at its best learning rate"
        )
    draw(row, options.picture)
    print(f"{options.picture}: {row['block']}, {row['size']}, rate {row['learning_rate']:g}, loss {row['loss']:.4f}")


if __name__ == "__main__":
    main()
