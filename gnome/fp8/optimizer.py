"""AdamW whose weights, moments and gradients stay in few bits: 5.1 bytes a parameter by default, 6 as FP8-LM has them.

| bytes a parameter | master weight | gradient | first moment | second moment |
|---|---|---|---|---|
| `block` | FP16 2 | E4M3 1.03 | E4M3 1.03 | E4M3 root 1.03 |
| `fp8lm` | FP16 2 | E4M3 1 | E4M3 1 | FP16 2 |
| `fp32` | FP16 2 | E4M3 1.03 | FP32 4 | FP32 4 |

That is with the FP16 weights of `convert_to_fp8(weights="fp16")`; BF16 weights cost the same, FP32 weights two bytes more.  Vectors, and
matrices below `min_size`, keep native gradients and moments in their own dtype.

One kernel updates all weights of a dtype; nothing waits for the device.  The step is skipped, and counted, when any gradient is not finite.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.fp8.collectives import reduce_gradients
from gnome.fp8.exact_parameters import ExactParameters
from gnome.fp8.gradients import GradientScaling, GradientStore
from gnome.fp8.kernels.availability import use_kernels
from gnome.fp8.layout import Sharding, lay_out
from gnome.fp8.optimizer_state import StateArena, States
from gnome.fp8.optimizer_step import StepInputs, step_coefficients, take_step
from gnome.fp8.registry import collect, is_scaled, layer_of_weight
from gnome.fp8.sharding import check_agreement, gather_share, mean_of_gradients, raise_to_largest, rank_and_size


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) over low-precision states, with one count of steps for all parameters.

    Gradients of weights move on into its own store as soon as they are there, and `.grad` stays None: torch's `clip_grad_norm_` would
    see but the small parameters, and `gradient_clip` takes its place.  No loss needs scaling; a GradScaler is refused.

    `gradients`: scales of the E4M3 gradients, by block unless `states` is fp8lm.  `gradient_clip`: largest norm of all gradients together.
    `lr` may be a tensor on the parameters' device, which a captured CUDA graph reads anew at every replay.  `sharding`: each rank of
    `group` keeps the states of its share of the weights (ZeRO, arXiv 1910.02054): cut evenly at blocks, or whole tensors spread greedily
    (FP8-LM).
    """

    _step_supports_amp_scaling = True  # or a GradScaler would unscale what it sees of the gradients, which is not all of them

    def __init__(  # noqa: PLR0913 - torch's signature, and what is new by name only
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: States = "block",
        gradients: GradientScaling | None = None,
        gradient_clip: float | None = None,
        min_size: int = 4096,
        seed: int = 0,
        sharding: Sharding | None = None,
        group: Any = None,
    ) -> None:
        _check(states, gradients, sharding, gradient_clip, min_size, seed)
        self.gradient_scaling: GradientScaling = gradients or ("tensor" if states == "fp8lm" else "block")
        self.kind, self.gradient_clip, self.seed, self.group = states, gradient_clip, seed, group
        rank, self.world = rank_and_size(group)
        self.shard = rank if sharding and self.world > 1 else None
        self.members: list[tuple[nn.Parameter, int]] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for own in self.param_groups:
            _check_group(own)
        self.members = [(p, index) for index, own in enumerate(self.param_groups) for p in own["params"] if p.requires_grad]
        if not self.members:
            raise InvalidInput("AdamW got no parameter that requires a gradient")
        if len({id(p) for p, _ in self.members}) < len(self.members):
            raise InvalidInput("AdamW got a parameter twice; list each once")
        for p, _ in self.members:
            _check_dtype(p)
        compact = [(p, g) for p, g in self.members if is_scaled(p) or (p.ndim > 1 and p.numel() >= max(min_size, 1))]
        self._compact = chosen = {id(p) for p, _ in compact}
        self._ranks_agree = False
        self.exact = ExactParameters([(p, g) for p, g in self.members if id(p) not in chosen])
        device = self.members[0][0].device
        self.step_count = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.gradient_norm = torch.zeros((), device=device)
        self.arenas: list[StateArena] = []
        self.stores: list[GradientStore] = []
        for dtype in sorted({p.dtype for p, _ in compact}, key=str):
            self._adopt([(p, g) for p, g in compact if p.dtype == dtype], sharding or "even")
        self._settings_rows: list[tuple[float, ...]] = []
        self._settings = torch.zeros(len(self.param_groups), 5, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is made; afterwards its buffers are laid out, and InvalidInput is raised."""
        if self.members:
            raise InvalidInput("parameters cannot be added to this optimizer; make a new one with all of them")
        super().add_param_group(param_group)

    def _adopt(self, members: list[tuple[nn.Parameter, int]], sharding: Sharding) -> None:
        """Lay parameters of one dtype end to end, keep their gradients from now on in E4M3, and make their states."""
        parameters = [p for p, _ in members]
        layout = lay_out([p.numel() for p in parameters], world=self.world, sharding=sharding)
        arena = StateArena.adopt(parameters, layout, self.kind, shard=self.shard, groups=[g for _, g in members], seed=self.seed)
        store = GradientStore(layout, parameters[0].device, self.gradient_scaling)
        for index, parameter in enumerate(parameters):
            layer = layer_of_weight(parameter)
            if layer is not None:
                layer.sink = (store, index)
            handle = collect(parameter, _absorb(store, index))
            weakref.finalize(self, _let_go, handle, None if layer is None else weakref.ref(layer), weakref.ref(store))
        self.arenas.append(arena)
        self.stores.append(store)

    @torch.no_grad()
    def reduce_gradients(self, **options: Any) -> None:
        """Replace gradients by their mean over the ranks of the group, in FP8; see `collectives.reduce_gradients`."""
        options.setdefault("mode", "fp8lm" if self.gradient_scaling == "tensor" else "all_to_all")
        for arena, store in zip(self.arenas, self.stores, strict=True):
            _absorb_leftovers(arena.parameters, store)
        if not self._ranks_agree:
            check_agreement([(tuple(p.shape), str(p.dtype), id(p) in self._compact) for p, _ in self.members], self.group)
            self._ranks_agree = True
        for store in self.stores:
            reduce_gradients(store, self.group, gather=self.shard is None, **options)
        mean_of_gradients([p for p, _ in self.exact.members], self.group)

    def refresh(self) -> None:
        """Let layers cast their weights again: after a replayed CUDA graph, before the model is used outside of it."""
        for arena in self.arenas:
            arena.mark_changed()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; nothing changes where any gradient is not finite."""
        if vars(self).pop("found_inf", None) is not None:
            raise InvalidInput(
                "gnome.fp8.AdamW needs no GradScaler and cannot undo its scale: call backward and step without one"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for arena, store in zip(self.arenas, self.stores, strict=True):
            _absorb_leftovers(arena.parameters, store)
        if self.shard is None and not (any(any(store.filled) for store in self.stores) or self.exact.gradients()):
            return loss
        control, coefficients = self._prepare()
        for arena, store in zip(self.arenas, self.stores, strict=True):
            arena.check_home()
            arena.set_active(store.filled)
            gradient, scale = store.share(arena.first_block, arena.last_block)
            take_step(arena, StepInputs(gradient, scale, coefficients, control, self.step_count), self._raise_to_largest)
            self._raise_to_largest(arena.weight_amax)
            arena.publish(self._gather)
            store.used = True
        self.exact.step(self.param_groups, control)
        return loss

    def _raise_to_largest(self, x: Tensor) -> None:
        if self.shard is not None:
            raise_to_largest(x, self.group)

    def _gather(self, share: Tensor) -> Tensor | None:
        return None if self.shard is None else gather_share(share, self.group)

    def _prepare(self) -> tuple[Tensor, Tensor]:
        """Count the step, and return `StepInputs.control` and `StepInputs.coefficients` (groups, 8)."""
        squares = [store.squared_norm() for store in self.stores]
        if norms := self.exact.gradient_norms():
            squares.append(torch.stack([norm.float() for norm in norms]).square().sum())
        total = torch.stack(squares).sum() if squares else torch.zeros_like(self.gradient_norm)
        settings = self._group_settings()
        if use_kernels(total.device):
            from gnome.fp8.kernels.step_inputs import write_control  # noqa: PLC0415 - needs Triton

            control, coefficients = total.new_empty(2), total.new_empty(len(settings), 8)
            counts = self.step_count, self.skipped_steps
            write_control(total, settings, self.gradient_norm, control, coefficients, *counts, self.gradient_clip)
            return control, coefficients
        norm = total.sqrt()
        self.gradient_norm.copy_(norm)
        factor = (self.gradient_clip or float("inf")) / (norm + 1e-6)
        clip = torch.where(factor < 1, factor, 1.0)
        skip = ~torch.isfinite(norm)
        self.step_count += 1 - skip.long()
        self.skipped_steps += skip.long()
        return torch.stack([skip.float(), clip]), step_coefficients(settings, self.step_count)

    def _group_settings(self) -> Tensor:
        """Return lr, betas, eps and weight decay of each parameter group (groups, 5), FP32 on the device."""
        rows = [
            (0.0 if isinstance(own["lr"], Tensor) else own["lr"], *own["betas"], own["eps"], own["weight_decay"])
            for own in self.param_groups
        ]
        if rows != self._settings_rows:
            on_host = torch.tensor(rows, dtype=torch.float32)
            on_host = on_host.pin_memory() if self._settings.is_cuda else on_host
            self._settings.copy_(on_host, non_blocking=True)
            self._settings_rows = rows
        for index, own in enumerate(self.param_groups):
            if isinstance(own["lr"], Tensor):
                self._settings[index, 0].copy_(own["lr"])
        return self._settings

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        for store in self.stores:
            store.clear()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's gradient as the next step will use it, before clipping, FP32; None where it has none.

        With sharding, after `reduce_gradients`, only this rank's share of it is meaningful.
        """
        for arena, store in zip(self.arenas, self.stores, strict=True):
            for index, own in enumerate(arena.parameters):
                if own is parameter:
                    return store.value(index).view(parameter.shape) if store.filled[index] else None
        return parameter.grad

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, by parameter: any number of ranks can load it.

        With sharding every rank must call this.
        """
        return {
            "states": self.kind,
            "seed": self.seed,
            "param_groups": [
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items() if k != "params"}
                for own in self.param_groups
            ],
            "step_count": self.step_count.clone(),
            "skipped_steps": self.skipped_steps.clone(),
            "arenas": [arena.state(self._gather) for arena in self.arenas],
            "exact": self.exact.state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after the model's own weights; raises InvalidCheckpoint where it does not fit."""
        missing = {"states", "seed", "param_groups", "step_count", "skipped_steps", "arenas", "exact"} - set(state_dict)
        if missing:
            raise InvalidCheckpoint(f"optimizer state without {', '.join(sorted(missing))}")
        if state_dict["states"] != self.kind:
            raise InvalidCheckpoint(f"optimizer state is {state_dict['states']!r}, this optimizer keeps {self.kind!r}")
        counts = [len(state_dict["param_groups"]), len(state_dict["arenas"]), len(state_dict["exact"])]
        if counts != [len(self.param_groups), len(self.arenas), len(self.exact.members)]:
            raise InvalidCheckpoint("optimizer state is of a model with other parameters or parameter groups")
        for number, (arena, states) in enumerate(zip(self.arenas, state_dict["arenas"], strict=True)):
            arena.load(states, f"arena {number}")
        self.exact.load(state_dict["exact"])
        self.seed = int(state_dict["seed"])
        for arena in self.arenas:
            arena.seed = self.seed
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for key, value in saved.items():
                if isinstance(own.get(key), Tensor):  # in place: a captured graph reads this very tensor
                    own[key].copy_(torch.as_tensor(value))
                else:
                    own[key] = value
        self.step_count.copy_(state_dict["step_count"])
        self.skipped_steps.copy_(state_dict["skipped_steps"])


def _let_go(handle: RemovableHandle, layer: Any, store: "weakref.ref[GradientStore]") -> None:
    """Leave gradients to whoever comes after an optimizer that is gone."""
    handle.remove()
    own = None if layer is None else layer()
    if own is not None and own.sink is not None and own.sink[0] is store():
        own.sink = None


def _absorb(store: GradientStore, index: int) -> Callable[[Tensor], None]:
    """Return a hook that moves a parameter's fresh gradient into the store."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            store.add(index, parameter.grad)
            parameter.grad = None

    return hook


def _absorb_leftovers(parameters: Sequence[nn.Parameter], store: GradientStore) -> None:
    """Take gradients that were set by hand, or computed before the optimizer was made."""
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            store.add(index, parameter.grad)
            parameter.grad = None


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, eps, decay = (group[key] for key in ("lr", "betas", "eps", "weight_decay"))
    numbers = (float(lr), eps, decay, *betas)
    if len(betas) != 2 or not all(0 <= x < math.inf for x in numbers) or max(betas) >= 1:  # also false for NaN
        raise InvalidInput(
            f"lr {lr}, betas {betas}, eps {eps} and weight_decay {decay} must be finite and >= 0, two betas below 1"
        )


def _check_dtype(parameter: nn.Parameter) -> None:
    if parameter.dtype in {torch.float32, torch.bfloat16} or is_scaled(parameter):
        return
    raise InvalidInput(
        f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; AdamW takes FP32 and BF16, and FP16 with the scale that "
        "convert_to_fp8(weights='fp16') gives it"
    )


def _check(
    states: str, gradients: str | None, sharding: str | None, gradient_clip: float | None, min_size: int, seed: int
) -> None:
    if states not in {"block", "fp8lm", "fp32"}:
        raise InvalidInput(f"states is {states!r}, expected block, fp8lm or fp32")
    if gradients not in {None, "block", "tensor"}:
        raise InvalidInput(f"gradients is {gradients!r}, expected block, tensor or None")
    if sharding not in {None, "even", "whole"}:
        raise InvalidInput(f"sharding is {sharding!r}, expected even, whole or None")
    if states == "fp8lm" and sharding == "even":
        raise InvalidInput("fp8lm scales moments by tensor and needs whole tensors on a rank: sharding='whole'")
    if gradient_clip is not None and not 0 < gradient_clip < math.inf:
        raise InvalidInput(f"gradient_clip is {gradient_clip}, expected a norm above 0, or None")
    if min_size < 0 or not 0 <= seed < 2**32:
        raise InvalidInput(f"min_size is {min_size} and seed {seed}, expected numbers >= 0, the seed below 2**32")
