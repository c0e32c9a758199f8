"""Do simplified blocks learn language as well as pre-LN?  The four blocks of `gnome.transformer` on books, loss, parameters and speed.

    python benchmarks/prepare_books.py ../shared/data/text FOLDER
    python benchmarks/transformer_language_model.py --books FOLDER [--size 30M] [--blocks ...] [--rates ...] [--seeds ...]
    python benchmarks/transformer_language_model.py --speed [--size paper] [--profile]  # one GPU: throughput of the blocks, in turns
    python benchmarks/transformer_language_model.py --toy                     # random tokens, a minute on a CPU

All blocks see the same batches in the same order: width and depth equal, ReLU MLPs four times as wide, rotary positions, the embedding is
the head's too, AdamW with a decay of 0.1 for matrices, 5 % of warm-up, then linearly to zero (arXiv 2311.01906, appendix D), in BF16.
`--rates` tries learning rates for every block; the table reports each block at its best, seeds together.  The gains of SAS and SAS-P
along the way are kept with the runs, which --results holds (by default $OUT/transformer_language_model.jsonl), a line each; a run found
there is not repeated.  Goals: SAS's loss within 2 % of pre-LN's, 13 to 16 % fewer parameters, throughput SAS >= 1.09 and SAS-P >= 1.16.
Size `paper` is the shape that its throughput was measured in; --profile lists the kernels of a step of each block.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpt_training import BETAS, CLIP, WEIGHT_DECAY, Text, sequences, window_starts
from gpu_timing import conditions, print_table, profile, time_in_turns, write_row
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gnome.transformer import BLOCKS, Transformer, TransformerSettings, parameter_groups

SIZES = {
    "30M": {"width": 384, "heads": 6, "depth": 8, "context": 512, "batch_tokens": 65536},
    "125M": {"width": 768, "heads": 12, "depth": 12, "context": 1024, "batch_tokens": 65536},
    "paper": {"width": 768, "heads": 12, "depth": 18, "context": 128, "batch_tokens": 65536},
    "toy": {"width": 64, "heads": 2, "depth": 3, "context": 64, "batch_tokens": 2048},
}
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
HEAD_TOKENS = 1 << 14
MARKS = 10
RUN = ("size", "tokens", "learning_rate")

Row = dict[str, Any]


class LanguageModel(nn.Module):
    """Embedding, transformer, and the embedding again as the head."""

    def __init__(self, block: str, size: Row, vocabulary: int) -> None:
        super().__init__()
        dials = {name: size[name] for name in ("width", "heads", "depth")}
        self.embedding = nn.Embedding(vocabulary, size["width"])
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.body = Transformer(TransformerSettings(block=block, causal=True, **dials))  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, nats a token."""
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        parts = zip(self.body(x).flatten(0, 1).split(HEAD_TOKENS), targets.flatten().split(HEAD_TOKENS), strict=True)
        return torch.stack([self.summed_loss(*part) for part in parts]).sum() / targets.numel()

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum the losses of x (tokens, width)."""
        return functional.cross_entropy(functional.linear(x, self.embedding.weight).float(), targets, reduction="sum")

    def compile_parts(self) -> None:
        """Compile each block, whose code serves all of them, and the head."""
        for block in self.body.blocks:
            block.compile(dynamic=False)
        self.summed_loss = torch.compile(self.summed_loss, dynamic=False)  # type: ignore[method-assign]

    def gains(self) -> dict[str, list[list[float]]]:
        """Gains by kind and layer, those of attention for every head."""
        kinds = {"alpha": "attention.alpha", "beta": "attention.beta", "gamma": "attention.gamma", "attention": "attention_gain"}
        kinds |= {"mlp": "mlp_gain", "skip": "skip_gain"}
        parameters = [dict(block.named_parameters()) for block in self.body.blocks]
        found = {
            kind: [own[name].detach().flatten().tolist() for own in parameters if name in own] for kind, name in kinds.items()
        }
        return {kind: values for kind, values in found.items() if values}


def make(block: str, size: Row, vocabulary: int, seed: int, device: torch.device, *, compiled: bool) -> tuple[LanguageModel, Any]:
    torch.manual_seed(seed)
    model = LanguageModel(block, size, vocabulary).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=0.0, betas=BETAS, fused=device.type == "cuda")
    if compiled:
        model.compile_parts()
    return model, optimizer


def loss_of(model: LanguageModel, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        loss: Tensor = model(*batch)
    return loss


def take_step(model: LanguageModel, optimizer: Any, batch: tuple[Tensor, Tensor], rate: float) -> None:
    loss_of(model, batch).backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validation_loss(model: LanguageModel, tokens: Tensor, context: int, at_once: int) -> float:
    """Mean over all whole batches of windows."""
    model.eval()
    starts = torch.arange((len(tokens) - 1) // context) * context
    losses = [loss_of(model, sequences(tokens, part, context)) for part in starts.split(at_once) if len(part) == at_once]
    model.train()
    return float(torch.stack(losses).mean())


def run(block: str, seed: int, rate: float, text: Text, options: argparse.Namespace) -> Row:
    """Train once."""
    size, device = SIZES[options.size], text.train.device
    context, n = size["context"], size["batch_tokens"] // size["context"]
    steps = int(options.tokens) // size["batch_tokens"]
    model, optimizer = make(block, size, text.vocabulary, seed, device, compiled=device.type == "cuda")
    starts = window_starts(len(text.train), context, steps * n, seed).to(device)
    warm_up = max(1, steps // 20)
    curve, gains, began = [], [(0, model.gains())], time.perf_counter()
    for step in range(steps):
        now = rate * min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
        take_step(model, optimizer, sequences(text.train, starts[step * n : (step + 1) * n], context), now)
        if (step + 1) % max(1, steps // MARKS) == 0 or step + 1 == steps:
            curve.append((step + 1, validation_loss(model, text.val, context, max(1, n // 4))))
            gains.append((step + 1, model.gains()))
    row = {
        "block": block,
        "seed": seed,
        "learning_rate": rate,
        "size": options.size,
        "tokens": options.tokens,
        "loss": curve[-1][1],
    }
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "curve": curve, "gains": gains}
    row |= {"in_blocks": sum(p.numel() for p in model.body.blocks.parameters()), "seconds": time.perf_counter() - began}
    return conditions() | row


def at_best_rate(rows: list[Row], size: str, block: str) -> list[Row]:
    """Return a block's runs at the learning rate that is best for its first seed, with which all rates were tried."""
    own = [row for row in rows if row["size"] == size and row["block"] == block]
    first = [row for row in own if row["seed"] == min(one["seed"] for one in own)]
    rate = min(first, key=lambda row: row["loss"])["learning_rate"] if own else None
    return [row for row in own if row["learning_rate"] == rate]


def print_rows(rows: list[Row]) -> None:
    """A table of each block at its best learning rate, beside pre-LN at its own."""
    for size in dict.fromkeys(row["size"] for row in rows):
        best = {block: at_best_rate(rows, size, block) for block in BLOCKS}
        best = {block: own for block, own in best.items() if own}
        for block in best:
            tried = sorted(
                (row["learning_rate"], row["seed"], row["loss"]) for row in rows if (row["size"], row["block"]) == (size, block)
            )
            print(f"{size} {block}: " + ", ".join(f"{rate:g} (seed {seed}): {loss:.4f}" for rate, seed, loss in tried))
        table = []
        for block, own in best.items():
            losses = [row["loss"] for row in own]
            cells: list[Any] = [block, len(own), f"{own[0]['learning_rate']:g}", f"{statistics.mean(losses):.4f}"]
            cells.append(f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "")
            for value, base in (
                (statistics.mean(losses), statistics.mean(row["loss"] for row in best.get("preln", own))),
                (own[0]["parameters"], best.get("preln", own)[0]["parameters"]),
                (own[0]["in_blocks"], best.get("preln", own)[0]["in_blocks"]),
            ):
                cells.append(f"{100 * (value / base - 1):+.2f} %")
            table.append((*cells, f"{own[0]['parameters'] / 1e6:.1f}M"))
        header = ("block", "seeds", "rate", "loss", "sd", "loss", "all parameters", "blocks' parameters", "parameters")
        print(f"\n{size}, {own[0]['tokens']:.3g} tokens, percentages beside pre-LN; {own[0]['gpu']}")
        print_table(header, table)


def speed(options: argparse.Namespace) -> None:
    """Time forward and backward, and the whole step, of all blocks in turns on random tokens."""
    size, device = SIZES[options.size], torch.device("cuda")
    vocabulary, n = 32768, size["batch_tokens"] // size["context"]
    tokens = torch.randint(vocabulary, (n, size["context"] + 1), device=device)
    batch = tokens[:, :-1], tokens[:, 1:]
    made = {block: make(block, size, vocabulary, 0, device, compiled=True) for block in options.blocks}

    def passes(model: LanguageModel) -> Callable[[], None]:
        def once() -> None:
            loss_of(model, batch).backward()
            model.zero_grad(set_to_none=True)

        return once

    rows = []
    for what, arms in (
        ("forward and backward", {block: passes(model) for block, (model, _) in made.items()}),
        ("whole step", {block: lambda own=own: take_step(*own, batch, 1e-4) for block, own in made.items()}),
    ):
        timings = time_in_turns(arms, warm_up=5, samples=15, inner=2)
        for block, timing in timings.items():
            ratio = timings["preln"].median / timing.median
            rows.append(
                (what, block, timing.median, size["batch_tokens"] / timing.median * 1e3, f"{ratio:.3f}x", timing.peak / 1e9)
            )
            write_row("transformer_speed", size=options.size, what=what, block=block, ms=timing.median, ratio=ratio)
    if options.profile:
        for block, own in made.items():
            profile(lambda own=own: take_step(*own, batch, 1e-4), block)
    print(f"\n{options.size}, {n} x {size['context']} tokens")
    print_table(("", "block", "ms", "tokens/s", "beside pre-LN", "peak GB, all blocks"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--size", default="30M", choices=SIZES)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=float, default=20e6, help="of one run")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    print(conditions())
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high")
    if options.results is None and os.environ.get("OUT"):
        options.results = Path(os.environ["OUT"]) / "transformer_language_model.jsonl"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with sdpa_kernel(ATTENTION, set_priority=True):
        if options.speed:
            speed(options)
            return
        if options.toy:
            options.size, options.tokens, text = "toy", 30e3, Text.random(512, 400_000, device)
        elif options.books is None:
            parser.error("--books, --toy or --speed is needed")
        else:
            text = Text.read(options.books, device)
        known = options.results.read_text().splitlines() if options.results and options.results.exists() else []
        rows = [json.loads(line) for line in known]
        for seed in options.seeds:
            for rate in options.rates:
                for block in options.blocks:
                    wanted = {"block": block, "seed": seed, "learning_rate": rate, "size": options.size, "tokens": options.tokens}
                    if any(all(row[key] == value for key, value in wanted.items()) for row in rows):
                        continue
                    rows.append(run(block, seed, rate, text, options))
                    print(f"{block}, seed {seed}, {rate:g}: {rows[-1]['loss']:.4f}, {rows[-1]['seconds']:.0f} s", flush=True)
                    if options.results:
                        with options.results.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
                    gc.collect()
    print_rows(rows)


if __name__ == "__main__":
    main()
