"""The optimizer's kernels write the same bits as the torch code beside them."""

import pytest
import torch

from gnome.fp8 import AdamW, fp8lm_step, optimizer, optimizer_step, scaling
from gnome.fp8.formats import E4M3, E5M2, Format
from gnome.fp8.gradients import GradientStore
from gnome.fp8.layout import lay_out
from gnome.fp8.optimizer_state import StateArena, States
from gnome.fp8.optimizer_step import StepInputs, take_step

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

NUMELS = (1000, 128, 5, 2500)


def make_arena(dtype: torch.dtype, states: States) -> tuple[StateArena, GradientStore]:
    generator = torch.Generator().manual_seed(3)
    layout = lay_out(NUMELS)
    weights = torch.zeros(layout.numel, dtype=dtype)
    arena = StateArena(layout, weights, states, shard=None, groups=[0, 1, 0, 1], seed=7)
    for index, numel in enumerate(NUMELS):
        values = torch.randn(numel, generator=generator) * 0.1
        if dtype == torch.float16:
            arena.weight_scale[index] = 2.0**10
            arena.weight_amax[index] = values.abs().max()
            values = values * 2.0**10
        layout.part(weights, index).copy_(values)
    return arena, GradientStore(layout, "cpu", "tensor" if states == "fp8lm" else "block")


def take_steps(arena: StateArena, store: GradientStore, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    for module in (optimizer_step, fp8lm_step):
        monkeypatch.setattr(module, "use_kernels", lambda _: kernels)
    generator = torch.Generator().manual_seed(5)
    for step in range(1, 6):
        for index, numel in enumerate(NUMELS):
            spread = torch.exp(2 * torch.randn(numel, generator=generator))
            store.add(index, torch.randn(numel, generator=generator) * spread * 1e-3)
        if step == 3:
            arena.active[1] = 0
        coefficients = torch.tensor(
            [
                [1 - 1e-3 * wd, 1e-3 * (1 - 0.95**step) ** 0.5 / (1 - 0.9**step), 0.9, 0.1, 0.95**0.5, 0.05**0.5, 1e-8, 0.95]
                for wd in (0.1, 0.0)
            ]
        )
        skipped = float(step == 4)
        control = torch.tensor([skipped, 0.7])
        take_step(arena, StepInputs(store.payload, store.block_scales(), coefficients, control, torch.tensor(step)))
        store.clear()
    return [arena.weights, arena.weight_scale, arena.weight_amax, *arena.first.state().values(), *arena.second.state().values()]


@pytest.mark.parametrize("states", ["block", "fp8lm", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_step_kernels_write_the_bits_of_the_torch_code(
    states: States, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = take_steps(*make_arena(dtype, states), True, monkeypatch)
    ours = take_steps(*make_arena(dtype, states), False, monkeypatch)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradient_kernel_writes_the_bits_of_the_torch_code(accumulate: bool) -> None:
    from gnome.fp8.kernels.gradients import store_gradient

    layout = lay_out(NUMELS)
    ours, theirs = GradientStore(layout, "cpu"), GradientStore(layout, "cpu")
    generator = torch.Generator().manual_seed(1)
    for part in range(11 if accumulate else 1):
        for index, numel in enumerate(NUMELS):
            gradient = torch.randn(numel, generator=generator) * torch.exp(3 * torch.randn(numel, generator=generator))
            if index == 2:
                gradient = gradient * float("nan")
            store_gradient(theirs, index, gradient, earlier=part)
            ours.add(index, gradient)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.payload.view(torch.uint8), theirs.payload.view(torch.uint8))
    torch.testing.assert_close(ours.squares, theirs.squares, equal_nan=True)
    assert not torch.isfinite(ours.squares[2])


@pytest.mark.parametrize("mode", ["current", "delayed"])
@pytest.mark.parametrize("shape", [(7, 40), (64, 128), (65, 130), (1, 16)])
@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_cast_kernel_writes_the_bits_of_the_torch_code(
    fmt: Format, shape: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(scaling, "use_kernels", lambda _, kernels=kernels: kernels)
        generator = torch.Generator().manual_seed(2)
        state = torch.zeros(18)
        state[0] = 1.0
        written = []
        for call in range(4):
            x = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 10.0 ** (call - 2)
            if call == 2:
                x[0, 0] = float("nan")
            if call == 3:
                x[0, 0], x[-1, -1] = float("inf"), -float("inf")
            current = mode == "current" or call == 0
            cast = scaling.quantize_matrix(x, state, fmt, current=current, rows=True, columns=True)
            assert int(cast.rows.float().isnan().sum()) == (call > 1) + (call == 3)
            written += [cast.rows.view(torch.uint8), cast.columns.view(torch.uint8), cast.inverse_scale, state.clone()]
        results.append(written)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_control_kernel_agrees_with_the_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(optimizer, "use_kernels", lambda _, kernels=kernels: kernels)
        weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1), "betas": (0.9 * (i > 0), 0.999)} for i, p in enumerate(weights)]
        adam = AdamW(groups, gradient_clip=2.0)
        written = []
        for norm in (1.0, 4.0, float("nan"), float("inf"), 3.0):
            for p in weights:
                p.grad = torch.full((8,), norm)
            control, coefficients = adam._prepare()
            written += [control, coefficients, adam.gradient_norm.clone(), adam.step_count.clone(), adam.skipped_steps.clone()]
        results.append(written)
    assert [int(results[0][-2]), int(results[0][-1])] == [3, 2]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
