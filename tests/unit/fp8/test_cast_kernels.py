"""The kernels that cast write what the torch code beside them writes, in both layouts, and no more."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gnome.fp8 import scaling
from gnome.fp8.formats import E4M3, E5M2, Format
from gnome.fp8.scaling import padded, quantize_matrix

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 16), (17, 130), (130, 17), (64, 128)])
def test_both_layouts_to_the_bit(
    fmt: Format, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0], x[-1, -1] = float("inf"), float("nan")
    written = {}
    for kernels in (True, False):
        monkeypatch.setattr(scaling, "use_kernels", lambda _, kernels=kernels: kernels)
        state = torch.zeros(18)
        state[2] = 5.0  # the history, from which the scale comes
        cast = quantize_matrix(x, state, fmt, current=False, rows=True, columns=True)
        assert cast.rows is not None
        assert cast.columns is not None
        written[kernels] = (cast.rows.float(), cast.columns.float(), cast.inverse_scale, state[[0, *range(2, 18)]])
        assert not state[1].isfinite()  # the next call leaves it out
    for ours, theirs in zip(written[True], written[False], strict=True):
        assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9))


def test_swiglu_and_norm_write_transposes_of_their_rows() -> None:
    from gnome.fp8.kernels import producers

    torch.manual_seed(0)
    state = torch.zeros(18)
    state[0] = 8.0
    inverse, n_row, hidden = 1 / state[0], 70, 130
    u, g = torch.randn(n_row, 2 * hidden), torch.randn(n_row, hidden)
    h, du_rows, du_columns = producers.swiglu_backward(g, u, inverse, state, padded(n_row), E4M3, E5M2)
    gate, up = u.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    du = torch.cat([g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid], dim=1)
    assert_close(h[:, :n_row].t(), functional.silu(gate) * up * 8, 2**-4)
    assert_close(du_rows, du * 8, 2**-3)
    assert torch.equal(bits(du_rows), bits(du_columns)[:, :n_row].t())
    assert state[1] == pytest.approx(float(du.abs().max()))

    x, gain = torch.randn(n_row, hidden), torch.rand(hidden) + 0.5
    rows, rms = producers.norm_rows(x, gain, 1e-6, state, E4M3)
    columns = producers.norm_columns(x, gain, rms, inverse, padded(n_row), E4M3)
    assert_close(rows, functional.rms_norm(x, (hidden,), gain, 1e-6) * 8, 2**-4)
    assert (bits(rows) != bits(columns)[:, :n_row].t()).float().mean() < 0.01  # order of multiplications
    for transposed in (h, du_columns, columns):
        assert not bits(transposed)[:, n_row:].any()


def assert_close(payload: Tensor, exact: Tensor, relative: float) -> None:
    assert ((payload.float() - exact).abs() <= relative * exact.abs() + 2**-9).all()
