"""The 12 matrix products of a transformer layer, forward and backward, quantisation included: ours, BF16 and torchao.

    python benchmarks/fp8_linear.py [--tokens 15872 8192] [--width 4096]

Four linear layers (QKV, projection, and the two of an MLP four times as wide) on random activations and output gradients; the weights
are cast anew in every run, as after an optimizer step.  TransformerEngine's documentation gives, for the same shapes on an H200 NVL: BF16
32.0 ms, FP8 delayed 19.0 (1.69x), current 20.3 (1.58x), operands already in FP8 1.90x.
"""

import argparse
from collections.abc import Callable

import torch
from gpu_timing import conditions, print_table, profile, time_in_turns, write_row
from torch import Tensor, nn

from gnome.fp8 import E4M3, E5M2, Format, Linear, LinearSettings
from gnome.fp8.scaling import Operand, product, quantize_matrix


def shapes(width: int) -> list[tuple[int, int]]:
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]


def both_passes(
    layers: list[nn.Module], inputs: list[Tensor], gradients: list[Tensor], weights: list[Tensor]
) -> Callable[[], None]:
    """Forward and backward of each layer; touching the weights makes every arm cast them again."""

    def run() -> None:
        for layer, x, g, weight in zip(layers, inputs, gradients, weights, strict=True):
            weight.grad = x.grad = None
            torch.autograd.graph.increment_version(weight)
            layer(x).backward(g)

    return run


def products_only(width: int, inputs: list[Tensor], gradients: list[Tensor], *, fast: bool) -> Callable[[], None]:
    """The three products of each layer on operands cast before: the ceiling of what a faster cast can give."""

    def cast(x: Tensor, fmt: Format) -> Operand:
        state = torch.ones(18, device="cuda")
        return quantize_matrix(x.detach(), state, fmt, current=True, rows=True, columns=True)

    sets = []
    for (k, n), x, g in zip(shapes(width), inputs, gradients, strict=True):
        sets.append((cast(x, E4M3), cast(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), E4M3), cast(g, E5M2)))

    def run() -> None:
        for x, w, g in sets:
            product(x, w, torch.bfloat16, fast=True)
            product(g, Operand(w.columns, None, w.inverse_scale), torch.bfloat16, fast=fast)
            product(
                Operand(g.columns, None, g.inverse_scale), Operand(x.columns, None, x.inverse_scale), torch.bfloat16, fast=fast
            )

    return run


def make_arms(width: int, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Callable[[], None]]:
    arms = {}

    def fresh() -> list[nn.Linear]:
        return [nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for k, n in shapes(width)]

    plain = fresh()
    arms["BF16"] = both_passes([torch.compile(layer) for layer in plain], inputs, gradients, [m.weight for m in plain])
    for name, settings in {
        "ours, delayed": LinearSettings(),
        "ours, current": LinearSettings(scaling="current"),
        "ours, delayed, fast sums": LinearSettings(fast_backward=True),
    }.items():
        layers = [Linear.from_weight(layer.weight, None, settings) for layer in fresh()]
        arms[name] = both_passes(list(layers), inputs, gradients, [m.weight for m in layers])
    for name, fast in (("operands already FP8", False), ("operands already FP8, fast sums", True)):
        arms[name] = products_only(width, inputs, gradients, fast=fast)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        print(f"torchao is left out: {error}")
        return arms
    for recipe in ("tensorwise", "rowwise"):
        holders = [nn.Sequential(layer) for layer in fresh()]
        for holder in holders:
            convert_to_float8_training(holder, config=Float8LinearConfig.from_recipe_name(recipe))
        weights = [holder[0].weight for holder in holders]
        arms[f"torchao {recipe}"] = both_passes([torch.compile(holder) for holder in holders], inputs, gradients, weights)
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[15872, 8192])
    parser.add_argument("--width", type=int, nargs="+", default=[4096])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    print(conditions())
    torch.manual_seed(0)
    for width in options.width:
        for tokens in options.tokens:
            sides = shapes(width)
            inputs = [torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, requires_grad=True) for k, _ in sides]
            gradients = [torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) * 1e-3 for _, n in sides]
            arms = make_arms(width, inputs, gradients)
            timings = time_in_turns(arms, warm_up=20, inner=5)
            flops = sum(6 * tokens * k * n for k, n in sides)
            rows = []
            for name, t in timings.items():
                ratio = timings["BF16"].median / t.median
                rows.append((name, t.median, f"{t.low:.2f}-{t.high:.2f}", f"{ratio:.2f}x", round(flops / t.median / 1e9)))
                write_row("fp8_linear", width=width, tokens=tokens, arm=name, ms=t.median, ratio=ratio)
            print(f"\nwidth {width}, {tokens} tokens")
            print_table(("arm", "ms", "quartiles", "beside BF16", "TFLOP/s"), rows)
            if options.profile:
                profile(arms["ours, delayed"], "ours, delayed")
            torch.compiler.reset()


if __name__ == "__main__":
    main()
