"""A stack of blocks with a final norm, for sequences (causal) or sets."""

from typing import Any

import torch
from torch import Tensor, nn

from gnome.errors import InvalidInput
from gnome.transformer.block import Block, RMSNorm
from gnome.transformer.cache import Cache
from gnome.transformer.rotary import angles
from gnome.transformer.settings import TransformerSettings


class Transformer(nn.Module):
    """`depth` blocks and a last norm, (B, T, width) to the same; takes the settings by name, see `TransformerSettings`.

    Embeddings and heads are the caller's.
    """

    def __init__(self, settings: TransformerSettings | None = None, **dials: Any) -> None:
        super().__init__()
        if settings is not None and dials:
            raise InvalidInput(f"give settings, or {', '.join(dials)} by name, not both")
        self.settings = TransformerSettings(**dials) if settings is None else settings
        self.blocks = nn.ModuleList([Block(self.settings, first=i == 0) for i in range(self.settings.depth)])
        self.norm = RMSNorm(self.settings.width, eps=self.settings.eps)

    def forward(self, x: Tensor, weights: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Apply.

        `weights` (B, T): of a set's tokens, at least one of each set above 0; 0 is padding, whose own output means nothing.  A prior of
        attention: a token of weight 2 is seen as two of weight 1 are.  Sequences are padded at the end and need none.  `cache`: of the
        tokens before x, which are added to it.
        """
        self._check(x, weights, cache)
        seen = 0 if cache is None else cache.seen
        turn = None
        if self.settings.causal and self.settings.rotary:
            places = torch.arange(seen, seen + x.shape[1], device=x.device)
            turn = angles(places, self.settings.width // self.settings.heads)
        for number, block in enumerate(self.blocks):
            x = block(x, weights, turn, None if cache is None else cache.layers[number], seen)
        if cache is not None:
            cache.seen += x.shape[1]
        return self.norm(x)

    def empty_cache(self, batch: int, room: int, dtype: torch.dtype | None = None) -> Cache:
        """Make a cache for so many sequences of at most `room` tokens, in the weights' dtype unless given; used without gradients."""
        if not self.settings.causal:
            raise InvalidInput("only a causal transformer has use for a cache: in a set every token sees all others")
        width = self.settings.width // self.settings.heads
        return Cache.empty(self.settings.depth, batch, self.settings.heads, width, room, self.norm.weight, dtype)

    def _check(self, x: Tensor, weights: Tensor | None, cache: Cache | None) -> None:
        if x.dim() != 3 or x.shape[2] != self.settings.width:
            raise InvalidInput(f"input has shape {tuple(x.shape)}, expected (batch, tokens, {self.settings.width})")
        if weights is not None and self.settings.causal:
            raise InvalidInput("a causal transformer takes no weights: pad sequences at the end, where no token looks")
        if weights is not None and weights.shape != x.shape[:2]:
            raise InvalidInput(f"weights have shape {tuple(weights.shape)}, expected {tuple(x.shape[:2])}")
        if cache is not None:
            if not self.settings.causal:
                raise InvalidInput("only a causal transformer has use for a cache")
            cache.check_room(x.shape[0], x.shape[1])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups: matrices decay; gains, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
