"""The fused parts of a transformer layer on a GPU, once their scales have a history, against float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.fp8 import GatedMLP, NormLinear


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
        error = float((a.double() - b.double()).norm().detach() / b.double().norm().detach())
        assert error < 0.12, f"tensor {number}: relative error {error:.3f}"


def test_delayed_casts_write_the_bits_of_the_torch_code() -> None:
    """The fused kernels against the same rule in torch, payloads to the bit but for neighbours, transposes exactly."""
    from gnome.fp8.formats import E4M3, E5M2
    from gnome.fp8.kernels import producers

    torch.manual_seed(0)
    state = torch.zeros(18, device="cuda")
    state[0] = 32.0
    inverse = 1 / state[0]
    x = torch.randn(1000, 384, device="cuda", dtype=torch.bfloat16)
    gain = torch.rand(384, device="cuda") + 0.5
    rows, rms = producers.norm_rows(x, gain, 1e-6, state, E4M3)
    columns = producers.norm_columns(x, gain, rms, inverse, 1008, E4M3)
    values = x.float() * rms[:, None] * gain
    assert_cast(rows, values * 32, E4M3.dtype)
    assert_cast(columns[:, :1000].t(), values * 32, E4M3.dtype)
    assert columns[:, 1000:].view(torch.uint8).count_nonzero() == 0
    u, g = (torch.randn(1000, n, device="cuda", dtype=torch.bfloat16) for n in (512, 256))
    gate, up = u.float().chunk(2, dim=1)
    silu = functional.silu(gate)
    assert_cast(producers.swiglu_rows(u, state, E4M3), silu * up * 32, E4M3.dtype)
    h, du_rows, du_columns = producers.swiglu_backward(g, u, inverse, state, 1008, E4M3, E5M2)
    sigmoid = torch.sigmoid(gate)
    du = torch.cat([g.float() * up * (sigmoid + silu * (1 - sigmoid)), g.float() * silu], dim=1)
    assert_cast(h[:, :1000].t(), silu * up * 32, E4M3.dtype)
    assert_cast(du_rows, du * 32, E5M2.dtype)
    assert torch.equal(du_rows.view(torch.uint8), du_columns[:, :1000].t().contiguous().view(torch.uint8))
    for padded in (h, du_columns):
        assert padded[:, 1000:].view(torch.uint8).count_nonzero() == 0


def assert_cast(payload: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """FP32 arithmetic in another order moves a number across a rounding boundary now and then, to the neighbour."""
    expected = values.to(dtype).float()
    differing = payload.float() != expected
    assert differing.float().mean() < 1e-3
    assert ((payload.float() - expected).abs() <= 0.26 * expected.abs() + 2**-9).all()
