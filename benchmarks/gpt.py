"""A plain GPT for quality measurements: pre-norm, RMSNorm, rotary positions, gated MLP (SwiGLU), untied embedding and head, no biases.

The linear layers of `blocks` are torch's own, for `convert_to_fp8` to replace; embedding, norms, attention and head are the same
in every arm.  Meant to run under BF16 autocast with FP32 parameters; the residual stream is BF16 there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIAL_DEVIATION = 0.02

HEAD_TOKENS = 1 << 15
"""Tokens whose logits are made at a time: with 32,768 tokens of vocabulary 2 GiB in BF16, and within 32-bit indices."""


@dataclass(frozen=True)
class Shape:
    """Sizes; `hidden` is that of the gated MLP, between its halves."""

    width: int
    heads: int
    hidden: int
    layers: int
    context: int
    vocabulary: int

    def flops_per_token(self) -> float:
        """Multiplications and additions of forward and backward, causal attention included, embedding look-up not."""
        matrices = self.layers * self.width * (4 * self.width + 3 * self.hidden) + self.width * self.vocabulary
        return 6 * matrices + 6 * self.layers * self.width * self.context


class RMSNorm(nn.Module):
    """x / rms(x) * gain, worked out in FP32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.gain).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Apply to x (sequences, tokens, width)."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, -1).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotated(q, cosine, sine), rotated(k, cosine, sine), v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs of features (..., tokens, heads, size) by their position's angles (Su et al., arXiv 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)


class Head(nn.Module):
    """Final norm, logits and their cross entropy, summed over the tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.width)
        self.linear = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum the losses of x (tokens, width)."""
        return functional.cross_entropy(self.linear(self.norm(x)).float(), targets, reduction="sum")


class GPT(nn.Module):
    """The language model; all parameters start as torch makes them, until `initialize`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.head = Head(shape)
        half = shape.width // shape.heads // 2
        angles = torch.arange(shape.context)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos()[:, None, :], persistent=False)
        self.register_buffer("sine", angles.sin()[:, None, :], persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, nats a token; `targets` are the tokens that follow `tokens`, both (sequences, tokens)."""
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        parts = zip(x.flatten(0, 1).split(HEAD_TOKENS), targets.flatten().split(HEAD_TOKENS), strict=True)
        return torch.stack([self.head(*part) for part in parts]).sum() / targets.numel()

    def compile_parts(self) -> None:
        """Compile each block and the head; what was compiled for one block serves all of them, and other models of the kind.

        Sizes are fixed: otherwise an arm that comes after another one's evaluation would be compiled for any number of sequences.
        """
        for part in (*self.blocks, self.head):
            part.compile(dynamic=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all weights anew: normal, and smaller where they add to the residual stream (Radford et al. 2019, section 2.3)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                joins = name.endswith(("out.weight", "down.weight"))
                deviation = INITIAL_DEVIATION / (2 * self.shape.layers) ** 0.5 if joins else INITIAL_DEVIATION
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
