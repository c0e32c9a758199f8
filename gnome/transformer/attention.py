"""Attention, plain and shaped.

Shaped attention (He & Hofmann, arXiv 2311.01906, equations 5 and 12) replaces a head's attention matrix A by

    alpha I + beta A - gamma C,

C being A where all queries are zero: 1/i for the i tokens that the i-th sees, or, in a set with weights w, w_j / sum w.  With the
gains at 1 and the queries at 0 it is the identity.  C V is a running mean, or a weighted one, and beta A V comes from the fused kernel, so
that no matrix of all pairs is built, but for sets of a few tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.transformer.cache import LayerCache
from gnome.transformer.rotary import rotated
from gnome.transformer.settings import TransformerSettings
from gnome.transformer.shaping import has_kernel, shaped_sequences

INITIAL_DEVIATION = 0.02

MULTIPLIED_OUT = 32
"""Sets of at most so many tokens, the elements of a formula, are multiplied out: a training step takes half as long."""


def centre(values: Tensor, weights: Tensor | None, *, causal: bool) -> Tensor:
    """Return C V (B, H, T or 1, d) of values (B, H, T, d), summed in FP32: what attention gives where all logits are the prior's.

    `weights` (B, T) of a set; None where all count the same.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    if causal:
        counts = torch.arange(1, values.shape[2] + 1, device=values.device, dtype=dtype)
        return (values.to(dtype).cumsum(2) / counts[:, None]).to(values.dtype)
    if weights is None:
        return values.mean(2, keepdim=True, dtype=dtype).to(values.dtype)
    share = (weights / weights.sum(1, keepdim=True)).to(dtype)
    return torch.einsum("bt,bhtd->bhd", share, values.to(dtype))[:, :, None].to(values.dtype)


def plain_attention(
    queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Return softmax(Q K^T / sqrt(d) + log w) V, all (B, H, T, d); `weights` (B, T) of a set's tokens, 0 for padding."""
    if causal:
        n_queries, n_keys = queries.shape[2], keys.shape[2]
        if n_queries == n_keys:
            return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        place = torch.arange(n_keys, device=queries.device)
        mask = None if n_queries == 1 else place <= place[n_keys - n_queries :, None]  # some after others: of a cache
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    prior = None if weights is None else weights.log()[:, None, None, :]
    if keys.shape[2] <= MULTIPLIED_OUT:
        return _multiplied_out(queries, keys, values, prior)
    prior = None if prior is None else prior.to(queries.dtype)
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=prior)


def _multiplied_out(queries: Tensor, keys: Tensor, values: Tensor, prior: Tensor | None) -> Tensor:
    """Attend with the matrix of all pairs, its softmax in FP32 at least."""
    logits = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if prior is not None:
        logits = logits + prior
    return logits.softmax(-1).to(values.dtype) @ values


class Gains(NamedTuple):
    """What the identity, attention and its centre are multiplied by, a number a head (H,) each."""

    alpha: Tensor
    beta: Tensor
    gamma: Tensor


def shaped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, gains: Gains, weights: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Return (alpha I + beta A - gamma C) V; arguments as of `plain_attention`."""
    attended = plain_attention(queries, keys, values, weights, causal=causal)
    if causal and has_kernel(values):
        return shaped_sequences(values, attended, torch.stack([gain.float() for gain in gains]))
    return _shaped(values, attended, centre(values, weights, causal=causal), gains)


def _shaped(values: Tensor, attended: Tensor, centred: Tensor, gains: Gains) -> Tensor:
    alpha, beta, gamma = (gain.to(values.dtype)[:, None, None] for gain in gains)
    return alpha * values + beta * attended - gamma * centred


class Attention(nn.Module):
    """Attention of (B, T, width) to itself, over normalised input.

    In `sas` and `sasp` it is shaped: values are the input itself, split among the heads, and nothing is projected back; only the first
    layer has a value matrix, I + 0 to begin with (equation 13 and appendix C), and queries begin at zero.
    """

    def __init__(self, settings: TransformerSettings, *, first: bool) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.heads, self.causal, self.shaped = heads, settings.causal, settings.skipless
        self.project = nn.Linear(width, (2 if self.shaped else 3) * width)
        nn.init.normal_(self.project.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.project.bias)
        self.out = self.value = None
        if not self.shaped:
            self.out = nn.Linear(width, width, bias=False)
            nn.init.normal_(
                self.out.weight, std=INITIAL_DEVIATION * (2 * settings.depth) ** -0.5
            )  # Radford et al. 2019, section 2.3
            return
        nn.init.zeros_(self.project.weight[:width])  # the queries
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        if first:
            self.value = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.value.weight)
            self.kept_gain, self.value_gain = (nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        seen: int = 0,
    ) -> Tensor:
        """Attend.  `weights` (B, T) of a set; `turn` rotary cosines and sines; `cache` of the `seen` tokens before x, which is added."""
        projected = self.project(x).unflatten(-1, (-1, self.heads, x.shape[-1] // self.heads))
        pair = projected[:, :, :2]
        if turn is not None:
            pair = rotated(pair, *turn)
        queries, keys = (part.transpose(1, 2) for part in pair.unbind(2))
        values = self._split(self._input_values(x)) if self.shaped else projected[:, :, 2].transpose(1, 2)
        values = values.to(queries.dtype)
        if cache is not None:
            y = self._attend_cached(queries, keys, values, cache, seen)
        elif self.shaped:
            y = shaped_attention(queries, keys, values, self.gains, weights, causal=self.causal)
        else:
            y = plain_attention(queries, keys, values, weights, causal=self.causal)
        y = y.transpose(1, 2).flatten(2)
        return y if self.out is None else self.out(y)

    @property
    def gains(self) -> Gains:
        """The gains of shaped attention."""
        return Gains(self.alpha, self.beta, self.gamma)

    def _attend_cached(self, queries: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, seen: int) -> Tensor:
        """Attend to what the cache holds and to the new tokens; the running mean costs one token's work each."""
        all_keys, all_values = cache.append(keys, values, seen)
        y = plain_attention(queries, all_keys.to(queries.dtype), all_values.to(queries.dtype), causal=True)
        if not self.shaped:
            return y
        sums = cache.total + values.to(cache.total.dtype).cumsum(2)
        cache.total.copy_(sums[:, :, -1:])
        counts = torch.arange(seen + 1, seen + 1 + values.shape[2], device=values.device)
        return _shaped(values, y, (sums / counts[:, None]).to(values.dtype), self.gains)

    def _input_values(self, x: Tensor) -> Tensor:
        """Return the input, or in the first layer a_V x + b_V W x."""
        if self.value is None:
            return x
        return self.kept_gain.to(x.dtype) * x + self.value_gain.to(x.dtype) * self.value(x)

    def _split(self, x: Tensor) -> Tensor:
        """Turn (B, T, width) into (B, H, T, width of a head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
