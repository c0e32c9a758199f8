"""What ranks exchange besides gradients: shares of flat tensors, and small exact reductions."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gnome.errors import InvalidInput


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """Rank and number of ranks; (0, 1) where torch.distributed is not set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_share(share: Tensor, group: Any = None) -> Tensor:
    """Join the ranks' equal shares of a flat tensor, in rank order; any dtype, as bytes."""
    _, size = rank_and_size(group)
    payload = share.contiguous().view(torch.uint8)
    whole = torch.empty(size * payload.numel(), dtype=torch.uint8, device=share.device)
    dist.all_gather_into_tensor(whole, payload, group=group)
    return whole.view(share.dtype)


def raise_to_largest(x: Tensor, group: Any = None) -> None:
    """Replace x in place by the elementwise largest over ranks; not finite anywhere is infinite everywhere (NCCL's MAX drops NaN)."""
    x.nan_to_num_(nan=float("inf"))
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)


def check_agreement(described: Sequence[object], group: Any = None) -> None:
    """Raise InvalidInput on all ranks unless they describe their parameters alike."""
    rank, size = rank_and_size(group)
    if size == 1:
        return
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, list(described), group=group)
    for other, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pairs = zip_longest(everyone[0], theirs, fillvalue="nothing")
            number, (first, own) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise InvalidInput(
                f"ranks train different models: parameter {number} is {first} on rank 0 and {own} on rank {other} "
                f"(shape, dtype, whether in few bits); this is rank {rank}"
            )


def mean_of_gradients(parameters: Sequence[nn.Parameter], group: Any = None) -> None:
    """Replace native gradients by their FP32 mean over ranks, in one exchange; a rank without one counts as zero."""
    _, size = rank_and_size(group)
    if size == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.detach().float() for p in parameters]
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    there = there.pin_memory() if gradients[0].is_cuda else there
    flat = torch.cat([*(g.reshape(-1) for g in gradients), there.to(gradients[0].device, non_blocking=True)])
    dist.all_reduce(flat, group=group)
    *means, ranks_with = flat.split([*(p.numel() for p in parameters), len(parameters)])
    # Only a rank that lacks a gradient must ask, and wait, whether others have it.
    anywhere = [True] * len(parameters) if bool(there.all()) else (ranks_with > 0).tolist()
    for parameter, mean, exists in zip(parameters, means, anywhere, strict=True):
        if exists:
            value = (mean / size).view(parameter.shape).to(parameter.dtype)
            parameter.grad = value if parameter.grad is None else parameter.grad.copy_(value)
