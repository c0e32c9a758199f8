"""The edge block of a graph network (MeshGraphNet's), with all that is done per edge in one kernel a matrix product.

    hidden = W_s h[senders] + W_r h[receivers] + W_e e + b      (a linear layer of the concatenation, split)
    new_e  = e + LayerNorm(W_o silu(hidden) + b_o)
    received[n] = sum of new_e over the edges that n receives

The node's parts of the first layer are products over nodes, not edges.  The norm ignores the mean of a row, so the second layer's
weight and bias have theirs, over the outputs, taken off beforehand: rows then have mean zero, and one sum over each, that of its
squares, is enough.  The one tensor kept per edge for backward is the edge itself: BF16, or E4M3 with a scale a row, half of it; all
else is computed again.  Sums run in FP32.  In FP8, operands of
products over features have a scale a row, worked out from the row itself (no history, nothing to calibrate), weights one each;
residual, norm, node products and sums stay in BF16 and FP32.  Results are the same bits every time.

Without a GPU, and for other widths, torch code computes the same: exactly in FP32 (FP64 for FP64 edges), in FP8 with operands
rounded as the kernels round them and gradients passed through.
"""

from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.fp8.formats import E4M3
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.linear import fp8_available
from gnome.fp8.scaled_tensor import Granularity, ScaledTensor

Precision = Literal["fp32", "bf16", "fp8"]

KERNEL_WIDTHS = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """How a kernel works: `programs` on each multiprocessor walk over tiles of `block` edges, the weight in shared memory.

    `ahead`: what a tile needs is asked for while the one before it is computed, which takes registers; otherwise another program
    works while one waits.
    """

    block: int = 64
    warps: int = 16
    programs: int = 1
    ahead: bool = True


@dataclass(frozen=True, kw_only=True)
class EdgeSettings:
    """Launch settings of each kernel with a product; `hidden` runs in both directions."""

    hidden: TileSettings = field(default_factory=TileSettings)
    output: TileSettings = field(default_factory=TileSettings)
    norm_gradient: TileSettings = field(default_factory=TileSettings)
    hidden_gradient: TileSettings = field(default_factory=TileSettings)
    edge_gradient: TileSettings = field(default_factory=TileSettings)

    @classmethod
    def of(cls, width: int) -> Self:
        """Return the fastest that were measured on an H100, of either precision (`benchmarks/fp8_edge_block.py --sweep`).

        Below width 256 two programs fit a multiprocessor.  There one program has it all, and asks ahead where registers last.
        """
        if width < max(KERNEL_WIDTHS):
            pair = TileSettings(warps=8, programs=2, ahead=False)
            return cls(
                hidden=replace(pair, ahead=True), output=pair, norm_gradient=pair, hidden_gradient=pair, edge_gradient=pair
            )
        at_once, few = TileSettings(ahead=False), TileSettings(warps=8)
        return cls(output=at_once, norm_gradient=at_once, hidden_gradient=few, edge_gradient=few)

    def packed(self) -> list[int]:
        """Return the settings as the numbers that a torch operator can take."""
        return [int(number) for tiles in astuple(self) for number in tiles]

    @classmethod
    def unpacked(cls, numbers: list[int]) -> Self:
        """Invert `packed`."""
        columns = zip(*(numbers[i::4] for i in range(4)), strict=True)
        tiles = (TileSettings(block=b, warps=w, programs=p, ahead=bool(a)) for b, w, p, a in columns)
        return cls(**{own.name: setting for own, setting in zip(fields(cls), tiles, strict=True)})


@dataclass(frozen=True)
class EdgeOrder:
    """The edges of a graph by receiver and by sender, worked out once a batch and shared by all layers.

    All int32: senders and receivers (E), offsets (N + 1) into the orders (E); `receiver_order` is None where the edges lie so
    already.
    """

    senders: Tensor
    receivers: Tensor
    receiver_offsets: Tensor
    receiver_order: Tensor | None
    sender_offsets: Tensor
    sender_order: Tensor

    @classmethod
    def of(cls, senders: Tensor, receivers: Tensor, n_nodes: int) -> Self:
        """Sort the edges; raises ValueError for an index outside [0, n_nodes).  Waits for the GPU."""
        if senders.shape != receivers.shape or senders.dim() != 1:
            raise ValueError(
                f"senders {tuple(senders.shape)} and receivers {tuple(receivers.shape)} must be two lists of equal length"
            )
        if senders.numel():
            low, high = (int(x) for x in torch.stack([senders, receivers]).aminmax())
            if low < 0 or high >= n_nodes:
                raise ValueError(f"edges name nodes from {low} to {high}, expected 0 to {n_nodes - 1}")
        in_order = bool((receivers[1:] >= receivers[:-1]).all())
        return cls(
            senders.int().contiguous(),
            receivers.int().contiguous(),
            _offsets(receivers, n_nodes),
            None if in_order else receivers.argsort(stable=True).int(),
            _offsets(senders, n_nodes),
            senders.argsort(stable=True).int(),
        )


def _offsets(index: Tensor, n_nodes: int) -> Tensor:
    counts = torch.bincount(index, minlength=n_nodes)
    return functional.pad(counts.cumsum(0), (1, 0)).int()


class EdgeBlock(nn.Module):
    """Edge update and the sum of edges that each node receives; see the module's text.

    Parameters are FP32.  The kernels work on BF16 edges; others are cast, and new edges come back as edges came in.  `precision` "fp32"
    takes torch code, in the edges' own precision.  It may be changed at any time.
    """

    def __init__(
        self, width: int, precision: Precision = "bf16", *, settings: EdgeSettings | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if precision not in ("fp32", "bf16", "fp8"):
            raise ValueError(f"precision is {precision!r}, expected 'fp32', 'bf16' or 'fp8'")
        self.width = width
        self.precision = precision
        self.settings = EdgeSettings.of(width) if settings is None else settings
        self.eps = eps
        first = (3 * width) ** -0.5  # torch's range for a linear layer, of the concatenation
        self.weight_sender = _uniform(first, width, width)
        self.weight_receiver = _uniform(first, width, width)
        self.weight_edge = _uniform(first, width, width)
        self.bias_hidden = _uniform(first, width)
        self.weight_out = _uniform(width**-0.5, width, width)
        self.bias_out = _uniform(width**-0.5, width)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, nodes: Tensor, edges: Tensor, senders: Tensor, receivers: Tensor, order: EdgeOrder | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return new edges (E, D) and what nodes (N, D) received, FP32; `order` is of the same senders and receivers.

        Give `order` where layers share a graph, and under torch.compile: working it out waits for the GPU.
        """
        self._check(nodes, edges, senders, receivers, order)
        if not self._has_kernels(edges.device):
            return self._torch_forward(nodes, edges, senders.long(), receivers.long())
        order = EdgeOrder.of(senders, receivers, nodes.shape[0]) if order is None else order
        narrow = nodes.to(torch.bfloat16)
        new_edges, received, *_ = _edge_forward(
            edges.to(torch.bfloat16).contiguous(),
            functional.linear(narrow, self.weight_sender.to(narrow.dtype)),
            functional.linear(narrow, self.weight_receiver.to(narrow.dtype), self.bias_hidden.to(narrow.dtype)),
            self.weight_edge,
            self.weight_out - self.weight_out.mean(0),
            torch.stack([self.bias_out - self.bias_out.mean(), self.norm_weight, self.norm_bias]),
            order.senders,
            order.receivers,
            order.receiver_offsets,
            order.receiver_order,
            order.sender_offsets,
            order.sender_order,
            self.eps,
            self.precision == "fp8" and fp8_available(edges.device),
            self.settings.packed(),
        )
        return new_edges.to(edges.dtype), received

    def _check(self, nodes: Tensor, edges: Tensor, senders: Tensor, receivers: Tensor, order: EdgeOrder | None) -> None:
        n_edges = edges.shape[0]
        if nodes.shape[1:] != (self.width,) or edges.shape[1:] != (self.width,):
            raise ValueError(f"nodes {tuple(nodes.shape)} and edges {tuple(edges.shape)} must have width {self.width}")
        if senders.shape != (n_edges,) or receivers.shape != (n_edges,):
            raise ValueError(f"{n_edges} edges have senders {tuple(senders.shape)} and receivers {tuple(receivers.shape)}")
        if order is not None and (order.senders.shape != (n_edges,) or order.sender_offsets.shape != (nodes.shape[0] + 1,)):
            raise ValueError(
                f"the order is of {order.senders.shape[0]} edges and {order.sender_offsets.shape[0] - 1} nodes, "
                f"the graph has {n_edges} and {nodes.shape[0]}"
            )

    def _has_kernels(self, device: torch.device) -> bool:
        return self.precision != "fp32" and self.width in KERNEL_WIDTHS and use_kernels(device)

    def _torch_forward(self, nodes: Tensor, edges: Tensor, senders: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the block by plain torch code."""
        dtype = torch.promote_types(edges.dtype, torch.float32)
        nodes, exact = nodes.to(dtype), edges.to(dtype)
        centred = self.weight_out - self.weight_out.mean(0)
        weights = [w.to(dtype) for w in (self.weight_sender, self.weight_receiver, self.weight_edge, centred)]
        of_sender = functional.linear(nodes, weights[0])
        of_receiver = functional.linear(nodes, weights[1], self.bias_hidden.to(dtype))
        # index_select, whose gradients on a CPU are summed in one order, while those of plain indexing race
        ends = of_sender.index_select(0, senders) + of_receiver.index_select(0, receivers)
        hidden = functional.linear(self._rounded(exact, "row"), self._rounded(weights[2], "tensor")) + ends
        activation = self._rounded(functional.silu(hidden), "row")
        out = functional.linear(activation, self._rounded(weights[3], "tensor"), self.bias_out.to(dtype))
        new_edges = exact + functional.layer_norm(
            out, (self.width,), self.norm_weight.to(dtype), self.norm_bias.to(dtype), self.eps
        )
        received = torch.zeros_like(nodes).index_add(0, receivers, new_edges)
        return new_edges.to(edges.dtype), received

    def _rounded(self, x: Tensor, granularity: Granularity) -> Tensor:
        """Round as FP8 would, passing gradients through; in BF16 leave x alone."""
        if self.precision != "fp8":
            return x
        return x + (ScaledTensor.quantize(x.detach(), E4M3, granularity).dequantize(x.dtype) - x.detach())

    def extra_repr(self) -> str:
        """Name the width and the precision."""
        return f"{self.width}, precision={self.precision!r}"


def set_edge_precision(model: nn.Module, precision: Precision) -> None:
    """Change the precision of all edge blocks of a model."""
    for module in model.modules():
        if isinstance(module, EdgeBlock):
            module.precision = precision


def _uniform(limit: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-limit, limit))


@torch.library.custom_op("gnome::edge_forward", mutates_args=())
def _edge_forward(
    edges: Tensor,
    projected_senders: Tensor,
    projected_receivers: Tensor,
    weight_edge: Tensor,
    weight_out: Tensor,
    vectors: Tensor,
    senders: Tensor,
    receivers: Tensor,
    receiver_offsets: Tensor,
    receiver_order: Tensor | None,
    sender_offsets: Tensor,
    sender_order: Tensor,
    eps: float,
    fp8: bool,
    settings: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return new edges (E, D) BF16, received (N, D) FP32, and what backward needs besides the inputs.

    That is the edges in FP8, payload (E, D) uint8 and inverse scales (E), both empty in BF16; and the weights as products take them,
    see `EdgeWeights`.  The projections (N, D) BF16 are the node's parts of the hidden layer; vectors (3, D) FP32: second bias, the
    norm's scale and shift.  Second weight and bias have mean zero over the outputs.
    """
    from gnome.fp8.kernels.edge_launch import forward  # noqa: PLC0415 - Triton need not be installed

    order = EdgeOrder(senders, receivers, receiver_offsets, receiver_order, sender_offsets, sender_order)
    ends = (projected_senders, projected_receivers)
    return forward(edges, ends, (weight_edge, weight_out, vectors), order, eps, fp8, EdgeSettings.unpacked(settings))


@_edge_forward.register_fake
def _(edges: Tensor, projected_senders: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (n_edges, width), fp8 = edges.shape, rest[-2]
    saved_rows = n_edges if fp8 else 0
    return (
        torch.empty_like(edges),
        torch.empty_like(projected_senders, dtype=torch.float32),
        edges.new_empty((saved_rows, width), dtype=torch.uint8),
        edges.new_empty((saved_rows,), dtype=torch.float32),
        edges.new_empty((4, width, width), dtype=E4M3.dtype if fp8 else torch.bfloat16),
        edges.new_empty((2,), dtype=torch.float32),
    )


@torch.library.custom_op("gnome::edge_backward", mutates_args=())
def _edge_backward(
    grad_edges: Tensor,
    grad_received: Tensor,
    saved: Tensor,
    saved_inverse_scale: Tensor,
    weights: Tensor,
    weight_inverse_scales: Tensor,
    projected_senders: Tensor,
    projected_receivers: Tensor,
    vectors: Tensor,
    senders: Tensor,
    receivers: Tensor,
    receiver_offsets: Tensor,
    receiver_order: Tensor | None,
    sender_offsets: Tensor,
    sender_order: Tensor,
    eps: float,
    fp8: bool,
    settings: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the first six inputs of `_edge_forward`."""
    from gnome.fp8.kernels.edge_launch import backward  # noqa: PLC0415 - Triton need not be installed
    from gnome.fp8.kernels.edge_weights import EdgeWeights  # noqa: PLC0415

    order = EdgeOrder(senders, receivers, receiver_offsets, receiver_order, sender_offsets, sender_order)
    return backward(
        (grad_edges, grad_received),
        (saved, saved_inverse_scale),
        (projected_senders, projected_receivers),
        EdgeWeights(weights, weight_inverse_scales),
        vectors,
        order,
        eps,
        fp8,
        EdgeSettings.unpacked(settings),
    )


@_edge_backward.register_fake
def _(grad_edges: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    senders, receivers, vectors = (torch.empty_like(x) for x in rest[5:8])
    weights = (grad_edges.new_empty(2 * grad_edges.shape[1:], dtype=torch.float32) for _ in range(2))
    return (torch.empty_like(grad_edges), senders, receivers, *weights, vectors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    edges, of_senders, of_receivers, _, _, vectors, *order = inputs[:12]
    fp8 = inputs[13]
    _, _, payload, inverse_scale, *weights = output
    ctx.save_for_backward(payload if fp8 else edges, inverse_scale, *weights, of_senders, of_receivers, vectors, *order)
    ctx.numbers = inputs[12:]


def _differentiate(ctx: Any, grad_edges: Tensor, grad_received: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _edge_backward(grad_edges, grad_received, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None for _ in range(9)))


_edge_forward.register_autograd(_differentiate, setup_context=_save)
