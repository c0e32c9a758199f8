"""Which layer a weight belongs to, and who takes its gradient: kept apart from the parameter, which can so be copied and pickled."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from gnome.fp8.linear import Linear

_layers: Any = WeakTensorKeyDictionary()
_collectors: Any = WeakTensorKeyDictionary()


def enroll(weight: nn.Parameter, layer: "Linear") -> None:
    """Note that a layer multiplies by a weight."""
    _layers[weight] = weakref.ref(layer)


def layer_of_weight(weight: Tensor) -> "Linear | None":
    """Return the FP8 layer of a weight, if there is one."""
    return _layers.get(weight, lambda: None)()


def is_scaled(parameter: Tensor) -> bool:
    """Whether a parameter is stored times a scale, which no optimizer but this package's knows."""
    layer = layer_of_weight(parameter)
    return layer is not None and layer.weight is parameter and layer.weight_scale is not None


def collect(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Let a hook take a parameter's fresh gradients, in the place of whatever took them before."""
    earlier = _collectors.get(parameter)
    if earlier is not None:
        earlier.remove()
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
    _collectors[parameter] = handle
    return handle
