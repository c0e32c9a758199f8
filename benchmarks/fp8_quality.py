"""Does training in FP8 reach the same loss?  A GPT of GPT-2's size on books: BF16 beside two levels of `gnome.fp8`, several seeds of each.

    python benchmarks/prepare_books.py ../shared/data/text FOLDER
    python benchmarks/fp8_quality.py --books FOLDER [--arms bf16 default fp8lm] [--seeds 0 1 2] [--studies tail wide]
    python benchmarks/fp8_quality.py --toy        # random tokens, minutes on a CPU

- `bf16`: FP32 weights, BF16 autocast, torch's fused AdamW.
- `default`: `convert_to_fp8(model.blocks, weights="fp16")` and `gnome.fp8.AdamW(states="block")`: stochastic rounding.
- `fp8lm`: the same with `states="fp8lm"`: scales by tensor, rounding to nearest.

Embedding and head multiply in BF16 in every arm; their weights are FP32, and `gnome.fp8.AdamW` keeps their gradients and moments
in few bits too.  With the same seed all arms have the same initial weights and the same batches in the same order.  The learning rate warms
up over the first tenth and falls along a cosine to a tenth of its peak.  Validation reads books that training did not, each arm with its
own products.

Runs are saved as they end, a line each in --results (by default $OUT/fp8_quality.jsonl); runs found there are not repeated, and the table
is of all of them.  A run of 40e6 tokens should take about 100 s on one H200 (estimate: 45 % of its BF16 rate).
"""

import argparse
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fp8_quality_studies as studies
import torch
from gpt import GPT
from gpt_training import ARMS, Arm, Text, learning_rate, sequences, shape_for, validation_losses, window_starts
from gpu_timing import conditions, print_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CHECKPOINTS = 10
CHECKPOINT_WINDOWS = 128
"""Sequences that the loss along the way is measured on; the last one is of the whole split."""

TOY = {"tokens": 60e3, "batch_tokens": 2048, "context": 64, "learning_rate": 3e-3}
FULL = {"tokens": 40e6, "batch_tokens": 131072, "context": 1024, "learning_rate": 1e-3}
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

Row = dict[str, Any]

HEADER = (
    "arm", "seeds", "loss", "sd", "bits a byte", "beside bf16", "in bf16's sd", "same seed", "tokens/s", "skipped", "bytes", "GB",
)  # fmt: skip


def train(arm: Arm, text: Text, settings: Row, seed: int) -> Row:
    """Train once; returns the losses along the way and the speed, without the first stretch, which compiles."""
    context, device = settings["context"], text.train.device
    n = settings["batch_tokens"] // context
    steps = int(settings["tokens"]) // settings["batch_tokens"]
    starts = window_starts(len(text.train), context, steps * n, seed).to(device)
    peak = settings["learning_rate"]
    marks = {round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    curve: list[tuple[int, float]] = []
    speeds: list[float] = []
    since, began = 0, time.perf_counter()
    for step in range(steps):
        lr = learning_rate(step, steps, peak=peak, floor=peak / 10, warm_up=max(steps // 10, 1))
        batch = sequences(text.train, starts[step * n : (step + 1) * n], context)
        arm.step(*batch, lr, settings["micro_batch"])
        if step + 1 in marks:
            synchronize(device)
            speeds.append((step + 1 - since) * settings["batch_tokens"] / (time.perf_counter() - began))
            losses = validation_losses(arm, text.val, windows=None if step + 1 == steps else CHECKPOINT_WINDOWS)
            curve.append(((step + 1) * settings["batch_tokens"], float(losses.mean())))
            since, began = step + 1, time.perf_counter()
    return {"loss": curve[-1][1], "curve": curve, "tokens_per_s": statistics.median(speeds[1:] or speeds), "steps": steps}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(name: str, seed: int, text: Text, settings: Row, *, compiled: bool) -> tuple[Row, GPT]:
    """Make an arm, train it, and return its row and its model."""
    device = text.train.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = make_model(text, settings, seed)
    arm = Arm.make(name, model, seed)
    if compiled:
        model.compile_parts()
    row = train(arm, text, settings, seed)
    row |= {
        "bits_per_byte": row["loss"] / text.bytes_per_token / 0.6931471805599453,
        "skipped": arm.skipped_steps,
        "bytes_per_parameter": arm.bytes_per_parameter,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "seconds": time.perf_counter() - began,
        "compiled": compiled,
    }
    return {**conditions(), "arm": name, "seed": seed, **settings, **row}, model


def make_model(text: Text, settings: Row, seed: int) -> GPT:
    """Return the model that every arm starts from, on the device."""
    model = GPT(shape_for(text, settings["context"], toy=settings["toy"]))
    model.initialize(seed)
    return model.to(text.train.device)


def read_rows(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append_row(path: Path | None, row: Row) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def matches(row: Row, settings: Row) -> bool:
    """Whether a row is of a run with these settings."""
    return "arm" in row and all(row.get(key) == value for key, value in settings.items())


def print_rows(rows: list[Row]) -> None:
    """Print the runs, one table for each group of settings, arms beside BF16."""
    kinds: list[Row] = []
    for row in rows:
        if "arm" in row and not any(matches(row, kind) for kind in kinds):
            kinds.append({key: row[key] for key in (*FULL, "micro_batch", "toy")})
    for kind in kinds:
        own = [row for row in rows if matches(row, kind)]
        sizes = f"{own[0]['parameters'] / 1e6:.0f}e6 parameters, {own[0]['steps']} steps of {kind['batch_tokens']:,} tokens"
        print(f"\n{'random tokens' if kind['toy'] else 'books'}: {sizes}, {own[0]['gpu']}, torch {own[0]['torch']}")
        print_table(
            HEADER,
            [summary(name, own) for name in ARMS if any(row["arm"] == name for row in own)],
        )
        for name in ARMS:
            curves = [row["curve"] for row in own if row["arm"] == name]
            if curves:
                means = [f"{statistics.mean(c[i][1] for c in curves):.4f}" for i in range(len(curves[0]))]
                print(f"  {name:8s} along the way: {' '.join(means)}")


def summary(name: str, rows: list[Row]) -> tuple[Any, ...]:
    """One line: mean and deviation over seeds, and the distance from BF16's mean and, seed by seed, from its runs."""
    own = {row["seed"]: row for row in rows if row["arm"] == name}
    base = {row["seed"]: row["loss"] for row in rows if row["arm"] == "bf16"}
    losses = [row["loss"] for row in own.values()]
    distance = statistics.mean(losses) - statistics.mean(base.values()) if base and name != "bf16" else None
    spread = deviation(list(base.values()))
    pairs = [row["loss"] - base[seed] for seed, row in own.items() if seed in base and name != "bf16"]
    return (
        name,
        len(own),
        f"{statistics.mean(losses):.4f}",
        f"{deviation(losses) or float('nan'):.4f}",
        f"{statistics.mean(row['bits_per_byte'] for row in own.values()):.4f}",
        "" if distance is None else f"{distance:+.4f}",
        f"{distance / spread:+.2f}" if distance is not None and spread else "",
        f"{statistics.mean(pairs):+.4f} ± {deviation(pairs) or float('nan'):.4f}" if pairs else "",
        round(statistics.median(row["tokens_per_s"] for row in own.values())),
        sum(row["skipped"] for row in own.values()),
        f"{statistics.mean(row['bytes_per_parameter'] for row in own.values()):.2f}",
        f"{max(row['peak_gb'] or 0.0 for row in own.values()):.1f}",
    )


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, help="folder that prepare_books.py wrote")
    parser.add_argument("--toy", action="store_true", help="random tokens and a tiny model instead")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=float, help="of one run, 40e6 unless said; at most four epochs")
    parser.add_argument("--batch-tokens", type=int, help="of one step, 131072 unless said")
    parser.add_argument("--micro-batch", type=int, help="sequences at a time; the whole batch unless said")
    parser.add_argument("--context", type=int, help="tokens of a sequence, 1024 unless said")
    parser.add_argument("--learning-rate", type=float, help="at its peak, 1e-3 unless said")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--studies", nargs="*", default=[], choices=("tail", "wide"))
    parser.add_argument("--results", type=Path, help="file of finished runs, read and added to")
    options = parser.parse_args()
    if not options.toy and options.books is None and (options.arms or "tail" in options.studies):
        parser.error("--books or --toy is needed")
    if options.results is None and os.environ.get("OUT"):
        options.results = Path(os.environ["OUT"]) / "fp8_quality.jsonl"
    return options


def settings_of(options: argparse.Namespace) -> Row:
    """Return what makes two runs comparable."""
    settings: Row = {key: getattr(options, key) or value for key, value in (TOY if options.toy else FULL).items()}
    if settings["batch_tokens"] % settings["context"] or settings["tokens"] < settings["batch_tokens"]:
        raise SystemExit("--batch-tokens must be a multiple of --context and no more than --tokens")
    return settings | {"micro_batch": options.micro_batch or settings["batch_tokens"] // settings["context"], "toy": options.toy}


def main() -> None:
    options = parse()
    settings = settings_of(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    print(conditions())
    rows = read_rows(options.results)

    def keep(row: Row) -> None:
        rows.append(row)
        append_row(options.results, row)

    with sdpa_kernel(ATTENTION, set_priority=True):
        if options.arms or "tail" in options.studies:
            text = Text.random(512, 400_000, device) if options.toy else Text.read(options.books, device)
            print(f"{len(text.train):,} training tokens, {len(text.val):,} for validation")
            weights = run_all(options, settings, text, rows, keep)
            if weights is not None:
                make = functools.partial(arm_from, text, settings, options.compile)
                studies.tail(make, weights, text, settings, keep)
    if "wide" in options.studies:
        studies.wide(device, keep, toy=options.toy)
    print_rows(rows)


def run_all(
    options: argparse.Namespace, settings: Row, text: Text, rows: list[Row], keep: Callable[[Row], None]
) -> dict[str, Tensor] | None:
    """Do the runs that are missing; returns a trained BF16 model's weights if a study needs them, trained anew where none was."""
    wanted = [(name, seed) for seed in options.seeds for name in options.arms]
    missing = [(n, s) for n, s in wanted if not any(matches(row, {**settings, "arm": n, "seed": s}) for row in rows)]
    weights: dict[str, Tensor] | None = None
    needs_weights = "tail" in options.studies
    if needs_weights and not any(name == "bf16" for name, _ in missing):
        missing.insert(0, ("bf16", (options.seeds or [0])[0]))
    for name, seed in missing:
        row, model = run(name, seed, text, settings, compiled=options.compile)
        print(
            f"{name}, seed {seed}: loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s, {row['skipped']} skipped, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
        if not any(matches(own, {**settings, "arm": name, "seed": seed}) for own in rows):
            keep(row)
        if needs_weights and weights is None and name == "bf16":
            weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        del model
        gc.collect()
    return weights


def arm_from(text: Text, settings: Row, compiled: bool, name: str, weights: dict[str, Tensor]) -> Arm:
    """Return an arm that starts from given weights of the plain model."""
    model = make_model(text, settings, 0)
    model.load_state_dict(weights)
    arm = Arm.make(name, model, seed=0)
    if compiled:
        model.compile_parts()
    return arm


if __name__ == "__main__":
    main()
