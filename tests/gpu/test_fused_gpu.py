"""The fused parts of a transformer layer on a GPU, once their scales have a history, against float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.fp8 import GatedMLP, NormLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def exact(module: nn.Module, x: Tensor) -> Tensor:
    gain = module.gain.double()
    unit = functional.rms_norm(x, gain.shape, gain, module.eps)
    if isinstance(module, NormLinear):
        return functional.linear(unit, module.linear.weight.double())
    gate, up = functional.linear(unit, module.up.weight.double()).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, module.down.weight.double())


@pytest.mark.parametrize("tokens", [5, 1000, 4096])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["norm linear", "gated mlp"])
def test_fused_parts_agree_with_float64(kind: str, compiled: bool, tokens: int) -> None:
    torch.manual_seed(0)
    module = (NormLinear(384, 256) if kind == "norm linear" else GatedMLP(384, 512)).cuda()
    module.gain.data.uniform_(0.5, 1.5)
    call = torch.compile(module) if compiled else module
    for _ in range(20):
        x = torch.randn(tokens, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        module.zero_grad()
        y = call(x)
        g = torch.randn_like(y)
        y.backward(g)
    ours = [y, x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    x64 = x.detach().double().requires_grad_()
    y64 = exact(module, x64)
    y64.backward(g.double())
    theirs = [y64, x64.grad, *(p.grad for p in module.parameters())]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < 0.12, f"tensor {number}: relative error {error:.3f}"
