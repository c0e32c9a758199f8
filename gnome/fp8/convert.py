"""Replace the linear layers of a model by FP8 ones, torch's and PyG's alike, and say what was replaced and what was not."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gnome.errors import InvalidInput
from gnome.fp8.formats import E4M3, FP16, GEMM_MULTIPLE
from gnome.fp8.linear import Linear, LinearSettings, scaled_weight

Filter = Callable[[str, nn.Module], bool]
Weights = Literal["as they are", "fp16", "e4m3"]


@dataclass(frozen=True)
class ConversionReport:
    """What became of every linear layer, by its name in the model: `converted` names, `kept` pairs of name and reason.

    `shared`: converted layers whose weight other modules use too; it stays stored as it was.
    """

    converted: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} linear layers in FP8, {len(self.kept)} as they were"]
        lines += [f"  {name}: {reason}" for name, reason in self.kept]
        lines += [f"  {name}: other modules use its weight, which stays stored as it was" for name in self.shared]
        return "\n".join(lines)


def convert_to_fp8(
    model: nn.Module,
    filter: Filter | None = None,  # noqa: A002 - the name users of such functions know
    *,
    settings: LinearSettings | None = None,
    weights: Weights = "as they are",
    min_features: int = 0,
) -> ConversionReport:
    """Replace, in place, every linear layer that `filter` (name, layer) lets through; parameters keep their values and stay shared.

    Layers with a side below `min_features`, or with fewer than 16 inputs or outputs, are kept.  `weights`: store the weights of
    converted layers in FP16 or E4M3 times a power of two; only `gnome.fp8.AdamW` updates such weights.  On one H200 layers narrower than
    1024 are slower in FP8 than in BF16 (docs/fp8.md).
    """
    if weights not in ("as they are", "fp16", "e4m3"):
        raise InvalidInput(f"weights is {weights!r}, expected 'as they are', 'fp16' or 'e4m3'")
    if isinstance(model, Linear) or _is_linear(model):
        raise InvalidInput("the model is itself a linear layer; use gnome.fp8.Linear.from_weight")
    converted: list[str] = []
    kept: list[tuple[str, str]] = []
    made: dict[int, Linear] = {}
    places = [  # of _modules, not getattr: a layer may be named as a method of Module is
        (f"{prefix}.{name}" if prefix else name, parent, name, layer)
        for prefix, parent in model.named_modules()
        for name, layer in parent._modules.items()  # noqa: SLF001
    ]
    for path, parent, name, layer in places:
        if layer is None or not _is_linear(layer):
            if isinstance(layer, nn.Linear):
                kept.append((path, f"it is a {type(layer).__name__}, not a plain linear layer"))
            continue
        reason = _reason_to_keep(path, layer, filter, min_features)
        if reason is not None:
            kept.append((path, reason))
            continue
        if id(layer) not in made:
            made[id(layer)] = _converted(layer, settings)
        parent._modules[name] = made[id(layer)]  # noqa: SLF001
        converted.append(path)
    shared = []
    if weights != "as they are":
        users = Counter(id(p) for module in model.modules() for p in module._parameters.values())  # noqa: SLF001
        for path, layer in model.named_modules():
            if isinstance(layer, Linear) and users[id(layer.weight)] > 1:
                shared.append(path)
            elif isinstance(layer, Linear):
                store_weight(layer, weights)
    return ConversionReport(tuple(converted), tuple(kept), tuple(shared))


def _converted(layer: Any, settings: LinearSettings | None) -> Linear:
    return Linear.from_weight(layer.weight, layer.bias, settings).train(layer.training)


def _is_linear(layer: nn.Module) -> bool:
    """Whether this is a plain linear layer of torch, or of PyG, whose class is not torch's."""
    kind = type(layer)
    return kind is nn.Linear or (kind.__name__ == "Linear" and kind.__module__.startswith("torch_geometric.nn."))


def _reason_to_keep(path: str, layer: Any, wanted: Filter | None, min_features: int) -> str | None:
    """Why a linear layer is left alone; None if it is not."""
    weight = layer.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its sizes are not known before the first call"
    n_out, n_in = weight.shape
    if min(n_in, n_out) < max(min_features, GEMM_MULTIPLE):
        return f"{n_in} -> {n_out} is narrower than {max(min_features, GEMM_MULTIPLE)}"
    if not weight.is_floating_point() or weight.dtype == torch.float64:
        return f"its weight is {weight.dtype}"
    if any(hooks for hooks in (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)):  # noqa: SLF001
        return "it has hooks, which would be lost"
    if wanted is not None and not wanted(path, layer):
        return "filtered out"
    return None


@torch.no_grad()
def restore_linear(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Put torch.nn.Linear layers with the true weights in `dtype` in the place of all FP8 ones, in place; shared weights stay shared."""
    if isinstance(model, Linear):
        raise InvalidInput("the model is itself a linear layer; use torch.nn.Linear and its dense_weight()")
    restored: dict[int, nn.Linear] = {}
    weights: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):  # noqa: SLF001
            if isinstance(layer, Linear):
                if id(layer) not in restored:
                    restored[id(layer)] = _plain(layer, dtype, weights)
                parent._modules[name] = restored[id(layer)]  # noqa: SLF001
    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None and id(parameter) in weights:
                module._parameters[name] = weights[id(parameter)]  # noqa: SLF001


def _plain(layer: Linear, dtype: torch.dtype, weights: dict[int, nn.Parameter]) -> nn.Linear:
    """Make a plain layer; `weights` maps the FP8 layers' weights to the new ones."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)
    if id(layer.weight) not in weights:
        weights[id(layer.weight)] = nn.Parameter(layer.dense_weight().to(dtype), requires_grad=layer.weight.requires_grad)
    plain.weight = weights[id(layer.weight)]
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    return plain.train(layer.training)


@torch.no_grad()
def store_weight(layer: Linear, storage: Weights) -> None:
    """Change how a layer's weight is stored, in place: the same parameter, narrower, times `weight_scale`."""
    dtype = FP16.dtype if storage == "fp16" else E4M3.dtype
    if layer.weight.dtype == dtype and layer.weight_scale is not None:
        return
    layer.weight.data, layer.weight_scale = scaled_weight(layer.dense_weight(), dtype)
    layer.enroll()
