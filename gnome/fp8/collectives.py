"""The mean of FP8 gradients over ranks, with one byte a number on the wire.

`all_to_all`, for gradients with a scale for every 128 numbers: every rank gets its shard from all others, adds in FP32, divides, rounds to
E4M3 with new scales, and the shards are gathered.  Each gradient is rounded once before it travels and once after, however many ranks
there are.  Scales travel as their exponents, a byte each.  Where the optimizer is sharded too (ZeRO) the gathering is left out.

`fp8lm`, for gradients with a scale for each tensor: the scheme of FP8-LM (arXiv 2310.18313, equations 3 to 6).  All ranks take the smallest
scale times a factor mu, round again, and let the collective add in E4M3; the division is left to the scale.  NCCL's ring adds two numbers
in FP16 and rounds the sum to E4M3 at every hop, so it loses accuracy as ranks are added.  It is here to compare with.

Both send FP8 as bytes, since gloo knows no FP8, except for NCCL's own sum.  On NCCL nothing waits for the device after the first reduction
of a store, unless a tensor has no gradient on this rank: whether another rank had one must then be read back.
"""

import functools
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from gnome.errors import InvalidInput
from gnome.fp8.automatic_scale import AutomaticScale, first_mu
from gnome.fp8.formats import BLOCK, E4M3, exponent_byte, power_of_two_scale, saturating_cast, scale_of_exponent
from gnome.fp8.gradients import GradientStore
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.layout import Layout

Mode = Literal["all_to_all", "fp8lm"]

SPAN_BLOCKS = 1 << 20
"""Blocks received before they are added: 128 MiB, so that a reduction needs little memory and adding runs beside the next transfer."""

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it

_agreed: weakref.WeakKeyDictionary[GradientStore, list[tuple[object, ...]]] = weakref.WeakKeyDictionary()


def reduce_gradients(
    store: GradientStore,
    group: dist.ProcessGroup | None = None,
    *,
    mode: Mode = "all_to_all",
    automatic_scale: AutomaticScale | None = None,
    gather: bool = True,
) -> None:
    """Replace the gradients in the store by their mean over the ranks of a group; a rank without one counts as zero.

    Afterwards `squares` are those of the mean over all of each tensor, before its last rounding in `all_to_all`, not finite where any
    rank's were not, and equal on all ranks, as is `filled`.  Without `gather`, `all_to_all` leaves only the rank's own shard of payload
    and scales valid.  Without `automatic_scale`, `fp8lm` uses mu = 1 / sqrt(ranks).  All ranks call this with the same arguments; the
    first time for a store it is checked that their layouts are equal, and InvalidInput raised on all ranks if not.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return
    ranks = _Ranks.of(group, store.payload.device)
    if ranks.size == 1:
        return
    _agree(store, ranks, mode, gather=gather)
    _check(store, ranks, mode, automatic_scale)
    if not store.layout.numels:
        return
    missing = [index for index, filled in enumerate(store.filled) if not filled]
    for index in missing:  # bytes of an earlier step
        store.layout.part(store.payload, index).view(torch.uint8).zero_()
        store.squares[index] = 0.0
    if mode == "all_to_all":
        squares = _reduce_shards(store, ranks, gather=gather)
        _settle(store, ranks, squares, missing)
    else:
        squares, saturated = _sum_in_fp8(store, ranks, automatic_scale)
        _settle(store, ranks, squares if ranks.rank == 0 else torch.zeros_like(squares), missing)
        if automatic_scale is not None:
            automatic_scale.update(saturated, _numels(store.layout, squares.device), store.squares)


def bytes_sent(layout: Layout, ranks: int, mode: Mode = "all_to_all", *, gather: bool = True) -> int:
    """Bytes that one rank sends in a reduction, what it sends to itself left out."""
    others = ranks - 1
    report = 2 * 4 * len(layout.numels) * others
    if mode == "fp8lm":  # a ring: a reduce-scatter and an all-gather
        smallest = 2 * 4 * 2 * len(layout.numels) * others // ranks
        return 2 * layout.numel * others // ranks + smallest + report
    once = (layout.numel + layout.n_blocks) * others // ranks
    return once * (2 if gather else 1) + report


class Reduction(Protocol):
    """The arithmetic of a reduction on a range of blocks: `TorchReduction`, or `KernelReduction` with the same results."""

    def mean(self, received: Tensor, scales: Tensor, begin: int, payload: Tensor, scale: Tensor) -> None: ...  # noqa: D102
    def squares(self) -> Tensor: ...  # noqa: D102
    def rescale(self, payload: Tensor, factor: Tensor) -> None: ...  # noqa: D102
    def census(self, payload: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102


class TorchReduction:
    """The arithmetic of a reduction on blocks `first` to `last` of a layout, in torch."""

    def __init__(self, layout: Layout, first: int, last: int, device: torch.device) -> None:
        self._owners = _owners(layout, device)[first:last]
        self._n_tensors = len(layout.numels)
        self._squares = torch.zeros(last - first, device=device)

    def mean(self, received: Tensor, scales: Tensor, begin: int, payload: Tensor, scale: Tensor) -> None:
        """Write the mean of a span that begins at block `begin` of the range.

        received (ranks, numbers of the span) E4M3; scales (ranks, blocks of the range), powers of two; payload and scale of the range are
        written.
        """
        span = slice(begin, begin + received.shape[1] // BLOCK)
        total = torch.zeros(received.shape[1] // BLOCK, BLOCK, device=received.device)
        for part, inverse in zip(received, 1.0 / scales[:, span], strict=True):
            total += part.view(-1, BLOCK).float() * inverse[:, None]
        mean = total * (1 / len(received))
        scale[span] = power_of_two_scale(mean.abs().amax(-1), E4M3)
        payload.view(-1, BLOCK)[span] = saturating_cast(mean * scale[span, None], E4M3)
        self._squares[span] = mean.square().sum(-1)

    def squares(self) -> Tensor:
        """Sum of squares of each tensor over the spans done."""
        return self._totals(self._squares)

    def rescale(self, payload: Tensor, factor: Tensor) -> None:
        """Multiply the payload of each tensor by its factor, in place."""
        blocks = payload.view(-1, BLOCK)
        blocks.copy_(saturating_cast(blocks.float() * factor[self._owners.clamp(max=self._n_tensors - 1), None], E4M3))

    def census(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of squares of each tensor's payload, scales left out, and the count of its numbers at +-448."""
        blocks = payload.view(-1, BLOCK).float()
        return self._totals(blocks.square().sum(-1)), self._totals((blocks.abs() == E4M3.max).float().sum(-1))

    def _totals(self, by_block: Tensor) -> Tensor:
        return by_block.new_zeros(self._n_tensors + 1).index_add_(0, self._owners, by_block)[:-1]


def ring_sum(parts: Sequence[Tensor]) -> Tensor:
    """Add E4M3 payloads as NCCL's ring does: two at a time in FP16, each sum rounded to E4M3."""
    total = parts[0]
    for part in parts[1:]:
        total = saturating_cast((total.half() + part.half()).float(), E4M3)
    return total


@dataclass(frozen=True)
class _Ranks:
    """A process group as one of its ranks sees it; `nccl`: whether it moves this device's tensors by NCCL."""

    group: dist.ProcessGroup
    rank: int
    size: int
    nccl: bool

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> "_Ranks":
        group = group or dist.group.WORLD
        rank = dist.get_rank(group)
        if group is None or rank < 0:
            raise InvalidInput("this process is not in the group that is to reduce gradients")
        backends = str(dist.get_backend_config(group)).split(",")
        return cls(group, rank, dist.get_world_size(group), f"{device.type}:nccl" in backends)

    def exchange(self, rows: Sequence[Tensor]) -> tuple[Tensor, dist.Work | None]:
        """Send row r to rank r: returns (ranks, numbers of a row) of what comes, and what to wait for before it is used."""
        received = rows[0].new_empty(self.size, rows[0].numel())
        if self.nccl:
            return received, dist.all_to_all(list(received.unbind(0)), list(rows), group=self.group, async_op=True)
        work = dist.all_to_all_single(received, torch.stack(list(rows)), group=self.group, async_op=True)
        return received, work

    def gather(self, own: Tensor, whole: Tensor | None = None) -> Tensor:
        """Put the ranks' tensors after each other, into `whole` where it is given; `own` may be its place in there."""
        whole = own.new_empty(self.size, *own.shape) if whole is None else whole
        _all_gather(whole.view(-1), own.reshape(-1), group=self.group)
        return whole


def _agree(store: GradientStore, ranks: _Ranks, mode: Mode, *, gather: bool) -> None:
    """Raise InvalidInput on all ranks unless all reduce the same tensors in the same way; asked once for a store and group."""
    layout = store.layout
    way = (weakref.ref(ranks.group), layout, store.scaling, mode, gather)
    known = _agreed.setdefault(store, [])
    if way in known:
        return
    digest = hashlib.sha256(repr(way[1:]).encode()).digest()[:8]
    words = [int.from_bytes(digest, "big", signed=True), len(layout.numels), sum(layout.numels), layout.n_blocks, layout.world]
    own = torch.tensor(words, device=store.payload.device if ranks.nccl else "cpu")
    everyone: list[list[int]] = ranks.gather(own).tolist()
    for other, theirs in enumerate(everyone):
        if theirs[0] != everyone[0][0]:
            raise InvalidInput(
                f"ranks would reduce different gradients: rank 0 has {_described(everyone[0])}, rank {other} {_described(theirs)}; "
                "sizes, order, kind of scales, mode and gather must be the same"
            )
    known.append(way)


def _described(words: Sequence[int]) -> str:
    return f"{words[1]} tensors of {words[2]} numbers in {words[3]} blocks for {words[4]} ranks"


def _check(store: GradientStore, ranks: _Ranks, mode: Mode, automatic_scale: AutomaticScale | None) -> None:
    layout = store.layout
    wanted = "block" if mode == "all_to_all" else "tensor"
    if store.scaling != wanted:
        raise InvalidInput(f"mode {mode} reduces gradients with scales by {wanted}, these have scales by {store.scaling}")
    if mode == "all_to_all" and (layout.world != ranks.size or layout.n_blocks % ranks.size):
        raise InvalidInput(
            f"gradients laid out for {layout.world} ranks in {layout.n_blocks} blocks cannot be split among the {ranks.size} ranks of "
            f"this group; lay them out with world={ranks.size}"
        )
    if automatic_scale is None:
        return
    if mode != "fp8lm":
        raise InvalidInput(f"an automatic scale belongs to mode fp8lm, the mode is {mode}")
    if len(automatic_scale.mu) != len(layout.numels):
        raise InvalidInput(
            f"the automatic scale is for {len(automatic_scale.mu)} tensors, the gradients are {len(layout.numels)}"
        )


def _reduce_shards(store: GradientStore, ranks: _Ranks, *, gather: bool) -> Tensor:
    """Exchange, add and gather; returns the sum of squares of each tensor over this rank's shard."""
    first, last = store.layout.shard(ranks.rank)
    step = max(1, SPAN_BLOCKS // ranks.size)
    reduction = _reduction(store.layout, first, last, step, store.payload.device)
    if first == last:
        return reduction.squares()
    own_payload, own_scale = store.payload[first * BLOCK : last * BLOCK], store.scale[first:last]
    shards = store.payload.view(torch.uint8).view(ranks.size, -1)
    exponents, exponents_sent = ranks.exchange(exponent_byte(store.scale).view(ranks.size, -1).unbind(0))
    begins = range(0, last - first, step)
    arriving = ranks.exchange(shards[:, : step * BLOCK].unbind(0))
    _wait(exponents_sent)
    scales = scale_of_exponent(exponents)
    for begin in begins:
        received, sent = arriving
        after = begin + step
        if after < begins.stop:  # travels while this span is added
            arriving = ranks.exchange(shards[:, after * BLOCK : (after + step) * BLOCK].unbind(0))
        _wait(sent)
        reduction.mean(received.view(E4M3.dtype), scales, begin, own_payload, own_scale)
    if gather:
        ranks.gather(own_payload.view(torch.uint8), store.payload.view(torch.uint8))
        store.scale.copy_(scale_of_exponent(ranks.gather(exponent_byte(own_scale)).view(-1)))
    return reduction.squares()


def _wait(work: dist.Work | None) -> None:
    """Let what follows on the device come after a transfer; on NCCL the host goes on."""
    if work is not None:
        work.wait()


def _sum_in_fp8(store: GradientStore, ranks: _Ranks, automatic_scale: AutomaticScale | None) -> tuple[Tensor, Tensor]:
    """Bring all ranks to one scale and add in E4M3; returns each tensor's sum of squares and count of saturated numbers."""
    reduction = _reduction(store.layout, 0, store.layout.n_blocks, store.layout.n_blocks or 1, store.payload.device)
    wanted = store.scale * (first_mu(ranks.size) if automatic_scale is None else automatic_scale.mu)
    # The scale 1 of a gradient of zeros must not push the others' below what E4M3 holds: it counts only where all are zero.
    smallest = torch.stack([torch.where(store.squares == 0, torch.inf, wanted), wanted])
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=ranks.group)
    shared = torch.where(torch.isfinite(smallest[0]), smallest[0], smallest[1])
    reduction.rescale(store.payload, shared / store.scale)
    if ranks.nccl:
        dist.all_reduce(store.payload, group=ranks.group)
    else:
        _emulate_ring(store.payload, ranks)
    store.scale.copy_(shared * ranks.size)
    squares, saturated = reduction.census(store.payload)
    return squares / store.scale / store.scale, saturated


def _emulate_ring(payload: Tensor, ranks: _Ranks) -> None:
    """Add as NCCL's ring: part r is added in the order of ranks r + 1, r + 2 ... r, and ends on rank r."""
    padded = functional.pad(payload.view(torch.uint8), (0, -payload.numel() % ranks.size))
    received, sent = ranks.exchange(padded.view(ranks.size, -1).unbind(0))
    _wait(sent)
    order = [(ranks.rank + 1 + hop) % ranks.size for hop in range(ranks.size)]
    own = ring_sum([received[rank].view(E4M3.dtype) for rank in order])
    payload.view(torch.uint8).copy_(ranks.gather(own.view(torch.uint8)).view(-1)[: payload.numel()])


def _settle(store: GradientStore, ranks: _Ranks, squares: Tensor, missing: Sequence[int]) -> None:
    """Make `squares` and `filled` those of all ranks: from this rank's share of the squares, and the tensors it had no gradient of.

    Added from a gathered copy in the same order everywhere, so that the ranks agree to the bit.
    """
    report = torch.stack([torch.where(torch.isfinite(store.squares), squares, torch.nan), torch.ones_like(squares)])
    for index in missing:
        report[1, index] = 0.0
    total = ranks.gather(report).sum(0)
    store.squares.copy_(total[0])
    if missing:
        store.filled = (total[1] > 0).tolist()


def _reduction(layout: Layout, first: int, last: int, step: int, device: torch.device) -> Reduction:
    if use_kernels(device):
        from gnome.fp8.kernels.reduction import KernelReduction  # noqa: PLC0415 - needs Triton

        return KernelReduction(layout, first, last, step, device)
    return TorchReduction(layout, first, last, device)


@functools.lru_cache(maxsize=8)
def _owners(layout: Layout, device: torch.device) -> Tensor:
    """Tensor of each block, int64; padding belongs to one past the last tensor."""
    owners = layout.owners(device).long()
    return torch.where(owners < 0, len(layout.numels), owners)


@functools.lru_cache(maxsize=8)
def _numels(layout: Layout, device: torch.device) -> Tensor:
    return torch.tensor(layout.numels, device=device)
