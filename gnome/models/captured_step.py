"""A training step as one CUDA graph: small networks are bound by the launches of their kernels, and a graph launches all at once."""

from collections.abc import Callable

import torch
from torch import Tensor

_CALLS_BEFORE = 3  # Optimizer states, compiled code and workspaces must exist before a capture.


class CapturedStep:
    """A function of tensors that is called as it is at first, then captured, and from then on replayed.

    Everything the function reads or writes besides its arguments must stay where it is, shapes may not depend on values, and nothing may
    wait for the device.  A call with arguments of other shapes is an ordinary one.  What is returned is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._calls = 0
        self._captured: tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor] | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Call on the current stream, which may not be the default one."""
        if self._calls < _CALLS_BEFORE:
            self._calls += 1
            return self._function(*arguments)
        if self._captured is None:
            self._captured = self._capture(arguments)
        graph, kept, result = self._captured
        if any(own.shape != new.shape for own, new in zip(kept, arguments, strict=True)):
            return self._function(*arguments)
        for own, new in zip(kept, arguments, strict=True):
            own.copy_(new)
        graph.replay()
        return result

    def _capture(self, arguments: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        kept = tuple(argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = self._function(*kept)
        return graph, kept, result
