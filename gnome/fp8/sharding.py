"""What ranks exchange besides gradients: shares of flat tensors, and small exact reductions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def mean_of(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Replace tensors in place by their FP32 mean over ranks, in one exchange."""
    _, size = rank_and_size(group)
    if size == 1 or not tensors:
        return
    flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, mean in zip(tensors, (flat / size).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))
