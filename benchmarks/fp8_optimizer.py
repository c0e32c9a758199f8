"""The optimizer step alone: ours in its three storages beside torch's fused AdamW (FP32) and torchao's AdamWFp8 (BF16 weights).

    python benchmarks/fp8_optimizer.py [--parameters 1e9]

Matrices of an 8B transformer's layers, random gradients.  Gradients are where the backward pass leaves them: FP32 for fused AdamW, BF16 for
torchao, E4M3 for ours; what storing them in E4M3 takes is a row of its own.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import conditions, print_table, profile, time_in_turns, write_row
from torch import nn

from gnome.fp8 import AdamW, convert_to_fp8, state_bytes

LAYER = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def matrices(total: int, dtype: torch.dtype) -> list[nn.Parameter]:
    made: list[nn.Parameter] = []
    while sum(p.numel() for p in made) < total:
        shape = LAYER[len(made) % len(LAYER)]
        made.append(nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02))
    return made


def ours(total: int, states: str) -> tuple[AdamW, Callable[[], Any], int]:
    model = nn.Sequential()
    for index, parameter in enumerate(matrices(total, torch.bfloat16)):
        layer = nn.Linear(parameter.shape[1], parameter.shape[0], bias=False, device="meta")
        layer.weight = parameter
        model.add_module(str(index), layer)
    convert_to_fp8(model, weights="fp16")
    optimizer = AdamW(model.parameters(), lr=1e-4, states=states, gradient_clip=1.0)  # type: ignore[arg-type]
    gradient = torch.randn(LAYER[2], device="cuda", dtype=torch.bfloat16).view(-1) * 1e-3

    def store() -> None:
        optimizer.zero_grad()
        for number, numel in zip(range(len(optimizer.stores[0].filled)), optimizer.stores[0].layout.numels, strict=True):
            optimizer.stores[0].add(number, gradient[:numel])

    store()
    return optimizer, store, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    total = int(parser.parse_args().parameters)
    print(conditions())
    torch.manual_seed(0)
    arms: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}
    weights = matrices(total, torch.float32)
    for p in weights:
        p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for p in weights)
    fused = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    arms["torch fused AdamW, FP32"], sizes["torch fused AdamW, FP32"] = fused.step, 16.0
    for states in ("block", "fp8lm", "fp32"):
        optimizer, store, own = ours(total, states)
        arms[f"ours, {states}"] = optimizer.step
        sizes[f"ours, {states}"] = state_bytes(optimizer).per_parameter
        if states == "block":
            arms["ours, storing gradients in E4M3"] = store
            print(state_bytes(optimizer), own)
    try:
        from torchao.optim import AdamWFp8

        narrow = matrices(total, torch.bfloat16)
        for p in narrow:
            p.grad = torch.randn_like(p) * 1e-3
        theirs = AdamWFp8(narrow, lr=1e-4, bf16_stochastic_round=True)
        arms["torchao AdamWFp8, BF16 weights"] = theirs.step
        sizes["torchao AdamWFp8, BF16 weights"] = 6.03
    except ImportError as error:
        print(f"torchao is left out: {error}")
    timings = time_in_turns(arms, warm_up=3, samples=20, inner=4)
    base = timings["torch fused AdamW, FP32"].median
    rows = []
    for name, t in timings.items():
        each = t.median / count * 1e9
        rows.append(
            (name, each, f"{t.low / count * 1e9:.2f}-{t.high / count * 1e9:.2f}", f"{base / t.median:.2f}x", sizes.get(name, ""))
        )
        write_row("fp8_optimizer", arm=name, parameters=count, ms_per_1e9=each, ratio=base / t.median)
    profile(arms["ours, block"], "ours, block")
    print_table(("arm", "ms per 1e9 parameters", "quartiles", "beside fused", "bytes a parameter"), rows)


if __name__ == "__main__":
    main()
