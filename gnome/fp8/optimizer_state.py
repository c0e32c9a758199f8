"""Weights and Adam moments of many parameters, flat, between steps.

- `block`: E4M3 first moment and E4M3 *root* of the second moment, a scale for every 128 numbers.  The root halves the range in
  binades, and blocks keep rows of small gradients apart from rows of large ones.
- `fp8lm`: E4M3 first moment, FP16 second moment, a scale for every tensor (FP8-LM, arXiv 2310.18313, section 2.2; MS-AMP `LBAdamW`).
- `fp32`: the first moment and the root of the second FP32.

FP32, BF16 and FP16 weights are their own master copy; FP16 weights are stored times a power of two.  E4M3 weights have an FP16 master,
of this rank's share alone (FP8-LM's level O3).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.fp8.formats import BLOCK, E4M3, FP16, Format, power_of_two_scale, saturating_cast
from gnome.fp8.layout import Layout
from gnome.fp8.registry import is_scaled, layer_of_weight
from gnome.fp8.scaled_tensor import ScaledTensor, check_scale

States = Literal["block", "fp8lm", "fp32"]
Gather = Callable[[Tensor], Tensor | None]

WEIGHT_MARGIN = 6
"""Binades left free above the largest FP16 weight, so that a scale from the previous step cannot overflow."""

CHUNK_BLOCKS = 1 << 14
"""Blocks that the torch code works on at a time; bounds its temporary memory."""


class StateArena:
    """Parameters of one dtype and their moments, laid out flat.

    The share, blocks `first_block` to `last_block`, is what is updated here: everything, or a rank's `shard`.  `home` holds all
    parameters, which are views of it; `weights` is the share's master copy, a view of `home` or, beside E4M3 parameters, FP16 of its own.
    `first`, `second`, `owners` (block -> parameter) cover the share; `weight_scale`, `weight_amax` (of the unscaled master), `groups`
    and `active` have one entry for each parameter.
    """

    def __init__(
        self, layout: Layout, home: Tensor, states: States, *, shard: int | None, groups: Sequence[int], seed: int
    ) -> None:
        device, n = home.device, len(groups)
        self.layout, self.home, self.states, self.seed = layout, home, states, seed
        self.parameters: list[nn.Parameter] = []
        self.first_block, self.last_block = (0, layout.n_blocks) if shard is None else layout.shard(shard)
        self.share = slice(self.first_block * BLOCK, self.last_block * BLOCK)
        self.published_scale = torch.ones(n, device=device) if home.dtype == E4M3.dtype else None
        self.weights = home[self.share] if self.published_scale is None else home[self.share].to(FP16.dtype)
        self.owners = layout.owners(device)[self.first_block : self.last_block].contiguous()
        self.groups = torch.tensor(groups, dtype=torch.int32, device=device)
        self.active = torch.ones(n, dtype=torch.int32, device=device)
        self.weight_scale = torch.ones(n, device=device)
        self.new_weight_scale = torch.ones(n, device=device)
        self.weight_amax = torch.zeros(n, device=device)
        self.first = self._empty_state(E4M3)
        self.second = self._empty_state(FP16 if states == "fp8lm" else E4M3)
        self._active = [True] * n
        self._versions: list[int] = []
        self._work: tuple[int, Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def adopt(cls, parameters: Sequence[nn.Parameter], layout: Layout, states: States, **settings: Any) -> Self:
        """Move parameters of one dtype and device into one flat buffer and make their states."""
        home = torch.zeros(layout.numel, dtype=parameters[0].dtype, device=parameters[0].device)
        for index, parameter in enumerate(parameters):
            if parameter.device != home.device:
                raise InvalidInput(f"parameters lie on {home.device} and {parameter.device}; move the model first")
            layout.part(home, index).copy_(parameter.detach().reshape(-1))
        arena = cls(layout, home, states, **settings)
        for index, parameter in enumerate(parameters):
            parameter.data = layout.part(home, index).view(parameter.shape)
            layer = layer_of_weight(parameter)
            if layer is not None and layer.weight_scale is not None and is_scaled(parameter):
                arena._adopt_scale(index, layer.weight_scale)
            amax = layout.part(home, index).float().abs().amax()
            arena.weight_amax[index] = amax / arena.weight_scale[index]
        arena.parameters = list(parameters)
        arena._versions = [p._version for p in parameters]  # noqa: SLF001
        return arena

    def _adopt_scale(self, index: int, scale: Tensor) -> None:
        """Make a layer's scale a view of ours, so that both change together."""
        ours = self.weight_scale if self.published_scale is None else self.published_scale
        ours[index] = scale
        if self.published_scale is not None:
            self.weight_scale[index] = scale  # the master starts as the E4M3 payload, which FP16 holds exactly
        scale.data = ours[index]

    def _empty_state(self, fmt: Format) -> ScaledTensor:
        n_blocks, device = self.last_block - self.first_block, self.weights.device
        dtype = torch.float32 if self.states == "fp32" else fmt.dtype
        n_scales = {"block": n_blocks, "fp8lm": len(self.groups), "fp32": 0}[self.states]
        payload = torch.zeros(n_blocks * BLOCK, dtype=dtype, device=device)
        return ScaledTensor(payload, torch.ones(n_scales, device=device), fmt, "block")

    @property
    def weight_name(self) -> str:
        """Short name of the weights' dtype."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[self.weights.dtype]

    @property
    def scaled(self) -> bool:
        """Whether the weights are stored times a scale."""
        return self.weights.dtype == torch.float16

    @property
    def state_bytes(self) -> int:
        """Bytes of the share's moments."""
        return self.first.nbytes + self.second.nbytes

    def work(self, rows: int) -> Tensor:
        """Cut the share into pieces of at most `rows` blocks of one parameter: int32 (pieces, 3) of parameter, first block, blocks."""
        if self._work is None or self._work[0] != rows:
            pieces = []
            for index in range(len(self.groups)):
                blocks = self.layout.blocks(index)
                start, stop = max(blocks.start, self.first_block), min(blocks.stop, self.last_block)
                firsts = torch.arange(start, max(start, stop), rows, dtype=torch.int32)
                counts = (stop - firsts).clamp(max=rows)
                pieces.append(torch.stack([torch.full_like(firsts, index), firsts - self.first_block, counts], dim=1))
            self._work = (rows, torch.cat(pieces).contiguous().to(self.weights.device))
        return self._work[1]

    def chunks(self) -> Iterator[slice]:
        """Cut the share into runs of blocks."""
        n_blocks = self.last_block - self.first_block
        for start in range(0, n_blocks, CHUNK_BLOCKS):
            yield slice(start, min(start + CHUNK_BLOCKS, n_blocks))

    def set_active(self, filled: Sequence[bool]) -> None:
        """Leave out the parameters that have no gradient."""
        if list(filled) != self._active:
            self._active = list(filled)
            active = torch.tensor(self._active, dtype=torch.int32)
            self.active.copy_(active.pin_memory() if self.active.is_cuda else active, non_blocking=True)

    def check_home(self) -> None:
        """Raise InvalidInput when a parameter was moved away from the flat buffer that is updated."""
        for index, parameter in enumerate(self.parameters):
            if parameter.data_ptr() != self.layout.part(self.home, index).data_ptr():
                raise InvalidInput(
                    f"parameter {index} of shape {tuple(parameter.shape)} was moved or replaced after the optimizer was made; "
                    "move the model to its device and dtype first, then make the optimizer"
                )
        versions = [p._version for p in self.parameters]  # noqa: SLF001 - torch has no other way to ask
        if versions != self._versions:
            for index, (new, old) in enumerate(zip(versions, self._versions, strict=True)):
                if new != old:
                    self._take_over(index)
            self._versions = versions

    def _take_over(self, index: int) -> None:
        """Go on from a weight that was loaded or changed by hand: its magnitude, and, beside E4M3, its master."""
        values = self.layout.part(self.home, index)
        if self.published_scale is not None:
            self.weight_scale[index] = self.published_scale[index]
            first = max(self.layout.starts[index], self.share.start)
            last = min(self.layout.starts[index] + self.layout.numels[index], self.share.stop)
            if first < last:
                self.weights[first - self.share.start : last - self.share.start] = self.home[first:last].to(FP16.dtype)
        largest = values.float().abs().amax() if values.numel() else values.new_zeros((), dtype=torch.float32)
        self.weight_amax[index] = largest / self.weight_scale[index]

    def publish(self, gather: Gather) -> None:
        """Bring the parameters up to date with the master copies of all ranks; `gather` joins the ranks' shares, or returns None."""
        share = self.weights
        if self.published_scale is not None:
            self.published_scale.copy_(power_of_two_scale(self.weight_amax, E4M3, previous=self.published_scale))
            tensor = self.owners.long().clamp(min=0)
            factor = (self.published_scale / self.weight_scale)[tensor, None]
            share = self.home[self.share]
            for blocks in self.chunks():
                numbers = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
                values = self.weights[numbers].view(-1, BLOCK).float() * factor[blocks]
                share[numbers] = saturating_cast(values, E4M3).view(-1)
        everything = gather(share)
        if everything is not None:
            self.home.copy_(everything)
        self.mark_changed()

    def mark_changed(self) -> None:
        """Move the parameters' version counters, which kernels do not, and take the change for our own."""
        torch.autograd.graph.increment_version(self.parameters)
        self._versions = [p._version for p in self.parameters]  # noqa: SLF001 - torch has no other way to ask

    def state(self, gather: Gather) -> list[dict[str, Tensor]]:
        """Return the moments of every parameter, one dictionary each, and what else an exact resume needs."""
        whole = {
            name: tensor if name.endswith("scale") and self.states == "fp8lm" else _joined(tensor, gather)
            for name, tensor in self._shared_tensors()
        }
        return [
            {
                **{name: self._part(name, tensor, index).clone() for name, tensor in whole.items()},
                "weight_scale": self.weight_scale[index].clone(),
                "weight_amax": self.weight_amax[index].clone(),
            }
            for index in range(len(self.parameters))
        ]

    def load(self, states: Sequence[Any], name: str) -> None:
        """Restore what `state` returned, whatever the number of ranks was; raises InvalidCheckpoint that names what is wrong."""
        if len(states) != len(self.parameters):
            raise InvalidCheckpoint(f"{name}: states of {len(states)} parameters, expected {len(self.parameters)}")
        for key, tensor in self._shared_tensors():
            per_block = tensor.numel() == self.owners.numel()
            whole = torch.zeros(self.layout.n_blocks * (1 if per_block else BLOCK), dtype=tensor.dtype, device=tensor.device)
            by_tensor = key.endswith("scale") and self.states == "fp8lm"
            whole = torch.ones_like(tensor) if by_tensor else whole
            for index, state in enumerate(states):
                part = self._part(key, whole, index)
                saved = state.get(key)
                if not isinstance(saved, Tensor) or saved.shape != part.shape or saved.dtype != part.dtype:
                    found = f"{saved.dtype} {tuple(saved.shape)}" if isinstance(saved, Tensor) else "missing"
                    raise InvalidCheckpoint(
                        f"{name}, parameter {index}: {key} is {found}, expected {part.dtype} {tuple(part.shape)}"
                    )
                if key.endswith("scale"):
                    check_scale(saved, part.shape, f"{name}, parameter {index}, {key}")
                part.copy_(saved)
            width = 1 if per_block else BLOCK
            tensor.copy_(whole if by_tensor else whole[self.first_block * width : self.last_block * width])
        for index, state in enumerate(states):
            where = f"{name}, parameter {index}"
            for key in ("weight_scale", "weight_amax"):
                if not isinstance(state.get(key), Tensor):
                    raise InvalidCheckpoint(f"{where}: {key} is missing")
            check_scale(state["weight_scale"], torch.Size(()), f"{where}, weight_scale")
            if not 0 <= float(state["weight_amax"]) < float("inf"):
                raise InvalidCheckpoint(f"{where}: weight_amax is {float(state['weight_amax'])}, expected a finite magnitude")
            self.weight_scale[index] = state["weight_scale"]
            self.weight_amax[index] = state["weight_amax"]
        self._versions = [p._version for p in self.parameters]  # noqa: SLF001 - the master that was loaded is theirs

    def _shared_tensors(self) -> list[tuple[str, Tensor]]:
        """Tensors of the share that a checkpoint holds."""
        tensors = [("first", self.first.payload), ("second", self.second.payload)]
        if self.states != "fp32":
            tensors += [("first_scale", self.first.scale), ("second_scale", self.second.scale)]
        if self.published_scale is not None:
            tensors.append(("master", self.weights))
        return tensors

    def _part(self, name: str, whole: Tensor, index: int) -> Tensor:
        """View one parameter's entry of a whole (not this rank's) tensor."""
        if not name.endswith("scale"):
            return self.layout.part(whole, index)
        return whole[index] if self.states == "fp8lm" else whole[self.layout.blocks(index)]


def _joined(share: Tensor, gather: Gather) -> Tensor:
    whole = gather(share)
    return share if whole is None else whole
