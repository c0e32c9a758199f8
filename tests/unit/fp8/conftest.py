"""Kernels run here under Triton's interpreter: the same code, on the CPU."""

import pytest
import torch


@pytest.fixture
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be called on CPU tensors.

    The interpreter's own casts are off: to FP8 it loses the carry when rounding reaches the next power of two (127 becomes 64), to BF16 it
    cuts off.  Torch's are put in their place, saturating to FP8 as the hardware does.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    import numpy as np
    import triton.language as tl

    theirs = interpreter._convert_float
    narrow = {
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, 448.0),
        tl.float8e5: (torch.float8_e5m2, torch.uint8, 57344.0),
        tl.bfloat16: (torch.bfloat16, torch.uint16, float("inf")),
    }

    def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if target not in narrow or source != tl.float32:
            return theirs(values, source, target, rounding)
        dtype, bits, largest = narrow[target]
        exact = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).clamp(-largest, largest)
        return exact.to(dtype).view(bits).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
