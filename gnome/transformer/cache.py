"""What a causal transformer keeps of the tokens it has seen, so that the next one costs one token's work."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gnome.errors import InvalidInput


@dataclass
class LayerCache:
    """One layer's keys and values (B, H, room, width of a head), and the sum of the values (B, H, 1, width of a head), at least FP32."""

    keys: Tensor
    values: Tensor
    total: Tensor

    def append(self, keys: Tensor, values: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Write what comes after `seen` tokens, and return all keys and values there are."""
        end = seen + keys.shape[2]
        self.keys[:, :, seen:end] = keys
        self.values[:, :, seen:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class Cache:
    """Keys and values of every layer for up to `room` tokens, of which `seen` are there."""

    layers: list[LayerCache]
    room: int
    seen: int = 0

    @classmethod
    def empty(
        cls, depth: int, batch: int, heads: int, width: int, room: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> "Cache":
        """Make one for `batch` sequences of at most `room` tokens; `width` is a head's, `like` gives device, and dtype unless given."""
        if room < 1 or batch < 1:
            raise InvalidInput(f"a cache needs room for at least one token of one sequence, not {room} of {batch}")
        shape = (batch, heads, room, width)
        dtype = like.dtype if dtype is None else dtype
        exact = torch.promote_types(dtype, torch.float32)
        layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=like.device),
                torch.zeros(shape, dtype=dtype, device=like.device),
                torch.zeros(batch, heads, 1, width, dtype=exact, device=like.device),
            )
            for _ in range(depth)
        ]
        return cls(layers, room)

    def check_room(self, batch: int, n_tokens: int) -> None:
        """Raise InvalidInput unless so many tokens more fit."""
        if batch != self.layers[0].keys.shape[0]:
            raise InvalidInput(f"the cache is for {self.layers[0].keys.shape[0]} sequences, these are {batch}")
        if self.seen + n_tokens > self.room:
            raise InvalidInput(f"the cache has room for {self.room} tokens and holds {self.seen}; {n_tokens} more do not fit")
