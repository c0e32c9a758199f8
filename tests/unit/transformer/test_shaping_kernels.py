"""The kernels of shaped sequences, against the same sums in FP64 and what autograd makes of them."""

import pytest
import torch
from torch import Tensor

from gnome.transformer.attention import Gains, centre
from gnome.transformer.shaping import shaped_sequences

pytest.importorskip("triton")


def given(batch: int, n_tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Values, attention and a gradient (B, T, H, d), and gains (3, H)."""
    generator = torch.Generator().manual_seed(n_tokens)
    tensors = [torch.randn(batch, n_tokens, heads, width, generator=generator).to(dtype) for _ in range(3)]
    return *tensors, 1 + 0.3 * torch.randn(3, heads, generator=generator)


def expected(values: Tensor, attended: Tensor, gradient: Tensor, gains: Tensor) -> tuple[Tensor, ...]:
    """The sum, and the gradients of values, attention and gains, all FP64."""
    v, a, g = (x.double().detach().requires_grad_() for x in (values, attended, gains))
    alpha, beta, gamma = (gain[:, None] for gain in Gains(*g))
    mean = centre(v.transpose(1, 2), None, causal=True).transpose(1, 2)
    shaped = alpha * v + beta * a - gamma * mean
    return shaped.detach(), *torch.autograd.grad(shaped, (v, a, g), gradient.double())


def relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 2, 16), (1, 130, 3, 32), (3, 1, 1, 64), (1, 63, 1, 128)])
def test_the_kernels_compute_the_sum_and_its_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from gnome.transformer.shaping_kernels import shape as shaped
    from gnome.transformer.shaping_kernels import shape_backward

    values, attended, gradient, gains = given(*shape, dtype)
    found = shaped(values, attended, gains), *shape_backward(gradient, values, attended, gains)
    limit = 2.0 ** (-8 if dtype == torch.bfloat16 else -10)
    for mine, right in zip(found, expected(values, attended, gradient, gains), strict=True):
        assert relative_error(mine, right) < limit


def test_layouts_do_not_matter() -> None:
    from gnome.transformer.shaping_kernels import shape as shaped
    from gnome.transformer.shaping_kernels import shape_backward

    values, attended, gradient, gains = given(2, 70, 2, 16, torch.float16)
    lying = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (values, attended, gradient)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (values, attended, gradient)]
    for v, a, g in (lying, turned):
        torch.testing.assert_close(shaped(v, a, gains), shaped(values, attended, gains), rtol=0, atol=0)
        for one, other in zip(shape_backward(g, v, a, gains), shape_backward(gradient, values, attended, gains), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_tokens_are_none() -> None:
    from gnome.transformer.shaping_kernels import shape as shaped
    from gnome.transformer.shaping_kernels import shape_backward

    values, attended, gradient, gains = given(2, 0, 2, 16, torch.float16)
    assert shaped(values, attended, gains).shape == values.shape
    assert shape_backward(gradient, values, attended, gains)[2].abs().max() == 0


def test_the_operator_has_the_kernels_gradients() -> None:
    values, attended, gradient, gains = given(2, 70, 2, 16, torch.float16)
    v, a = (x.transpose(1, 2).detach().requires_grad_() for x in (values, attended))
    g = gains.clone().requires_grad_()
    found = shaped_sequences(v, a, g)
    found.backward(gradient.transpose(1, 2))
    right = expected(values, attended, gradient, gains)
    for mine, other in zip((found.detach(), v.grad, a.grad), right, strict=False):
        assert mine is not None
        assert relative_error(mine.transpose(1, 2), other) < 2.0**-10
    assert g.grad is not None
    assert relative_error(g.grad, right[3]) < 2.0**-10
