"""Transformer layers in training: forward + backward, and the whole step with the optimizer; ours, BF16 and torchao, all compiled.

    python benchmarks/fp8_training_step.py [--models 8B-layers 1.3B] [--profile]

`8B-layers`: four layers of an 8B model (width 4096, 32 heads, 8 of keys and values, gated MLP of 14336), 2 x 4096 tokens, without
embedding and head.  `1.3B`: 24 layers of width 2048 with embedding, head and loss, 8 x 2048 tokens; embedding and head stay BF16 in
every arm.
Random tokens and weights, the same model code but for the layers that an arm is about.  Attention is the same in all arms.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import conditions, print_table, profile, time_in_turns, write_row
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gnome.fp8 import AdamW, GatedMLP, Linear, NormLinear, convert_to_fp8, state_bytes


@dataclass(frozen=True)
class Shape:
    width: int
    heads: int
    kv_heads: int
    hidden: int
    layers: int
    batch: int
    tokens: int
    vocabulary: int = 0


SHAPES = {
    "8B-layers": Shape(4096, 32, 8, 14336, 4, 2, 4096),
    "1.3B": Shape(2048, 16, 16, 5632, 24, 8, 2048, 32000),
    "toy": Shape(128, 4, 2, 256, 2, 2, 64, 512),
}


class PlainNormLinear(nn.Module):
    def __init__(self, width: int, n_out: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class PlainMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Shape, *, fp8: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.width // shape.heads
        n_qkv = (shape.heads + 2 * shape.kv_heads) * self.size
        self.qkv = (NormLinear if fp8 else PlainNormLinear)(shape.width, n_qkv)
        self.out = (Linear if fp8 else nn.Linear)(shape.width, shape.width, bias=False)
        self.mlp = (GatedMLP if fp8 else PlainMLP)(shape.width, shape.hidden)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        b, t, _ = x.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).view(b, t, -1, self.size).split(sizes, dim=2)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, -1))
        return x + self.mlp(x)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)


class Model(nn.Module):
    def __init__(self, shape: Shape, *, fp8: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(shape, fp8=fp8) for _ in range(shape.layers)])
        self.embedding = nn.Embedding(shape.vocabulary, shape.width) if shape.vocabulary else None
        self.head = PlainNormLinear(shape.width, shape.vocabulary) if shape.vocabulary else None
        half = shape.width // shape.heads // 2
        angles = torch.arange(shape.tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sine", angles.sin()[None, :, None, :], persistent=False)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x).to(torch.bfloat16)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        if self.head is None or targets is None:
            return x
        return functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


@dataclass
class Arm:
    model: nn.Module
    optimizer: Any
    autocast: bool
    note: str

    def passes(self, x: Tensor, target: Tensor) -> None:
        """Forward and backward."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            y = self.model(x, target) if self.model.head is not None else self.model(x)
        if self.model.head is not None:
            y.backward()
        else:
            y.backward(target)

    def step(self, x: Tensor, target: Tensor) -> None:
        """Take a whole training step."""
        self.passes(x, target)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_arm(kind: str, shape: Shape, device: str) -> Arm:
    torch.manual_seed(0)
    ours = kind.startswith("ours")
    model = Model(shape, fp8=ours).to(device)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    lr = 1e-4
    if kind == "BF16 autocast, fused AdamW FP32":
        arm = Arm(model, torch.optim.AdamW(model.parameters(), lr=lr, fused=True), True, "16 bytes of state")
    elif kind == "BF16 weights and states, fused AdamW":
        model.to(torch.bfloat16)
        arm = Arm(model, torch.optim.AdamW(model.parameters(), lr=lr, fused=True), False, "8 bytes of state")
    elif kind.startswith("torchao"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.optim import AdamWFp8

        model.to(torch.bfloat16)
        recipe = Float8LinearConfig.from_recipe_name(kind.split()[1].rstrip(","))
        convert_to_float8_training(model.blocks, config=recipe)
        arm = Arm(model, AdamWFp8(model.parameters(), lr=lr, bf16_stochastic_round=True), False, "6.03 bytes of state")
    else:
        states = "fp8lm" if "fp8lm" in kind else "block"
        for p in [*(model.embedding or nn.Module()).parameters(), *(model.head or nn.Module()).parameters()]:
            p.data = p.data.to(torch.bfloat16)
        convert_to_fp8(model.blocks, weights="fp16")
        optimizer = AdamW(model.parameters(), lr=lr, states=states)  # type: ignore[arg-type]
        arm = Arm(model, optimizer, False, f"{state_bytes(optimizer).per_parameter:.2f} bytes of state")
    for block in model.blocks:
        block.compile()
    return arm


KINDS = (
    "BF16 weights and states, fused AdamW",
    "BF16 autocast, fused AdamW FP32",
    "torchao tensorwise, AdamWFp8",
    "torchao rowwise, AdamWFp8",
    "ours, default",
    "ours, fp8lm",
)


def times_of(
    kinds: tuple[str, ...], shape: Shape, inputs: tuple[Tensor, Tensor], name: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Time forward + backward and the whole step of some arms in turns; for both, and as "note", what is found by arm."""
    arms: dict[str, Arm] = {}
    for kind in kinds:
        try:
            arms[kind] = make_arm(kind, shape, "cuda")
        except ImportError as error:
            print(f"{kind} is left out: {error}")

    def passes_of(arm: Arm) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.graph.increment_version([p for p in arm.model.parameters() if p.ndim > 1])
            arm.passes(*inputs)
            arm.optimizer.zero_grad(set_to_none=True)

        return run

    found: dict[str, dict[str, Any]] = {"note": {kind: arm.note for kind, arm in arms.items()}}
    for what, runs in (
        ("forward + backward", {k: passes_of(a) for k, a in arms.items()}),
        ("whole step", {k: (lambda a=a: a.step(*inputs)) for k, a in arms.items()}),
    ):
        found[what] = time_in_turns(runs, warm_up=20, samples=options.samples, inner=2)
        print(f"{what}: " + ", ".join(f"{kind} {t.median:.1f} ms" for kind, t in found[what].items()), flush=True)
        if options.profile:
            for kind, run in runs.items():
                profile(run, f"{name}, {what}, {kind}")
    return found


def measure(name: str, shape: Shape, options: argparse.Namespace) -> None:
    n = (shape.batch, shape.tokens)
    if shape.vocabulary:
        x, target = (torch.randint(shape.vocabulary, n, device="cuda") for _ in range(2))
    else:
        x = torch.randn(*n, shape.width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        target = torch.randn(*n, shape.width, device="cuda", dtype=torch.bfloat16) * 1e-4
    found: dict[str, dict[str, Any]] = {}
    for kinds in [(kind,) for kind in KINDS] if options.one_by_one else [KINDS]:
        for what, own in times_of(kinds, shape, (x, target), name, options).items():
            found.setdefault(what, {}).update(own)
        gc.collect()
        torch.cuda.empty_cache()
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in Model(shape, fp8=False).parameters())
    print(f"\n{name}: {n_parameters / 1e9:.2f}e9 parameters, {shape.batch} x {shape.tokens} tokens")
    for what, reference in (("forward + backward", KINDS[0]), ("whole step", KINDS[1])):
        rows = []
        for kind, t in found[what].items():
            ratio = found[what][reference].median / t.median
            speed = shape.batch * shape.tokens / t.median * 1e3
            rows.append(
                (kind, t.median, f"{t.low:.1f}-{t.high:.1f}", f"{ratio:.2f}x", round(speed), t.peak / 1e9, found["note"][kind])
            )
            write_row(
                "fp8_training_step", model=name, what=what, arm=kind, ms=t.median, ratio=ratio, reference=reference, peak=t.peak
            )
        print(f"\n{name}, {what}; ratios beside {reference}")
        print_table(("arm", "ms", "quartiles", "ratio", "tokens/s", "peak GB", ""), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["8B-layers", "1.3B"], choices=list(SHAPES))
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--one-by-one", action="store_true", help="not in turns: for GPUs that do not hold all arms at once")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    print(conditions())
    torch._dynamo.config.recompile_limit = 64
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    for name in options.models:
        with sdpa_kernel(backends, set_priority=True):
            measure(name, SHAPES[name], options)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
