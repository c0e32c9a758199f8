"""FP8 layers in the hands of a training program: shared, frozen, cast, copied, saved, loaded, and passed from optimizer to optimizer."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnome.errors import InvalidInput
from gnome.fp8 import AdamW, GatedMLP, Linear, NormLinear, convert_to_fp8, prepare, restore_linear, statistics, watching

KINDS = {"linear": Linear, "norm linear": NormLinear, "gated mlp": GatedMLP}


def network(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 96), nn.Tanh(), nn.Linear(96, width))


def batch(seed: int = 0, width: int = 64) -> torch.Tensor:
    return torch.randn(32, width, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, x: torch.Tensor) -> None:
    (model(x) - x).square().mean().backward()


def dense(model: nn.Module) -> list[torch.Tensor]:
    return [layer.dense_weight() for layer in model.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scaled_weight_is_not_cast_silently(dtype: torch.dtype) -> None:
    model = network()
    convert_to_fp8(model, weights="e4m3" if dtype == torch.float16 else "fp16")
    before = dense(model)
    with pytest.raises(InvalidInput, match="cannot be cast"):
        model.to(dtype)
    assert all(torch.equal(old, new) for old, new in zip(before, dense(model), strict=True))


def test_scalings_stay_fp32_when_a_model_is_cast() -> None:
    model = network()
    convert_to_fp8(model)
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].input_scaling.state.dtype == torch.float32
    backward(model, batch().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_that_no_state_fits_are_refused(dtype: torch.dtype) -> None:
    for size in (128, 4):
        with pytest.raises(InvalidInput, match=f"a parameter of shape \\({size}, 64\\) is {dtype}"):
            AdamW([nn.Parameter(torch.zeros(size, 64, dtype=dtype))])


@pytest.mark.parametrize("alive", [True, False])
def test_a_second_optimizer_takes_over(alive: bool) -> None:
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    first, _ = prepare(model, lr=1e-2, min_size=1)
    kept = first if alive else None
    del first
    second = AdamW(model.parameters(), lr=1e-2, min_size=1)
    before = [model[0].weight.detach().clone(), model[1].dense_weight()]
    model(torch.arange(64)).square().mean().backward()
    second.step()
    assert not torch.equal(before[0], model[0].weight)
    assert not torch.equal(before[1], model[1].dense_weight())
    assert kept is None or not any(any(store.filled) for store in kept.stores)


def test_torch_s_optimizer_finds_its_gradients_after_ours_is_gone() -> None:
    model = network()
    convert_to_fp8(model)
    ours = AdamW(model.parameters())
    backward(model, batch())
    assert model[0].weight.grad is None
    del ours
    backward(model, batch())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("weights", ["as they are", "fp16", "e4m3"])
def test_models_are_pickled_and_copied(weights: Any, tmp_path: Path) -> None:
    model = network()
    convert_to_fp8(model, weights=weights)
    AdamW(model.parameters(), lr=1e-2)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other.eval()(batch()), model.eval()(batch()))
        optimizer = AdamW(other.parameters(), lr=1e-2, min_size=1)
        before = dense(other)
        backward(other.train(), batch())
        optimizer.step()
        assert not any(torch.equal(old, new) for old, new in zip(before, dense(other), strict=True))


@pytest.mark.parametrize("level", ["O1", "O2", "O3", "default"])
@pytest.mark.parametrize("factor", [100.0, 1e-3])
def test_other_weights_are_loaded_at_their_own_scale(level: str, factor: float) -> None:
    plain = network()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(factor)
    model = network()
    optimizer, _ = prepare(model, level, lr=0.0, weight_decay=0.0, min_size=1)
    model.load_state_dict(plain.state_dict())
    for step, bad in enumerate((1.0, math.nan, 1.0)):  # a step that is skipped must not touch them either
        allowed = 0.04 if level == "O3" else 1e-3
        for layer, exact in ((model[0], plain[0]), (model[2], plain[2])):
            error = float((layer.dense_weight() - exact.weight.detach()).norm() / exact.weight.detach().norm())
            assert error < allowed, f"before step {step}"
        (model(batch()).square().mean() * bad).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_changing_one_weight_leaves_the_masters_of_others() -> None:
    model = network()
    optimizer, _ = prepare(model, "O3", lr=1e-3, min_size=1)
    for seed in range(3):
        backward(model, batch(seed))
        optimizer.step()
    (arena,) = optimizer.arenas
    before = arena.weights.clone()
    with torch.no_grad():
        model[0].set_weight(model[0].dense_weight() * 0.5)
    arena.check_home()
    first = arena.layout.part(arena.weights, 0)
    rest = arena.layout.part(arena.weights, 1), arena.layout.part(before, 1)
    assert torch.equal(first, arena.layout.part(arena.home, 0).half())
    assert torch.equal(*rest)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_layer_is_used_twice_before_backward(kind: str, backend: str | None) -> None:
    torch.manual_seed(0)
    layer: nn.Module = KINDS[kind](64, 64)
    twice: Any = nn.Sequential(layer, layer)
    call: Any = layer
    if backend is not None:
        twice, call = (torch.compile(one, backend=backend) for one in (twice, call))
    twice(batch()).square().mean().backward()
    two = call(batch(1)).square().mean(), call(batch(2)).square().mean()
    for loss in two:
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("sink", [True, False])
def test_a_frozen_weight_stays(kind: str, sink: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), KINDS[kind](64, 64))
    optimizer = AdamW(model.parameters(), lr=1e-2, min_size=1) if sink else None
    frozen = [p for p in model[1].parameters() if p.ndim > 1]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.detach().clone() for p in frozen]
    backward(model, batch())
    if optimizer is not None:
        optimizer.step()
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(frozen, before, strict=True))


def test_gradients_of_the_last_step_are_not_added_to() -> None:
    model = network()
    optimizer, _ = prepare(model, lr=0.0, weight_decay=0.0, min_size=1)
    norms = []
    for _ in range(3):
        model.zero_grad()  # the model's, which does not know of the optimizer
        backward(model, batch())
        optimizer.step()
        norms.append(float(optimizer.gradient_norm))
    assert max(norms) < 1.05 * min(norms)


def test_restored_layers_stay_shared_and_fused_parts_work() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.part = nn.Embedding(96, 64), nn.Sequential(NormLinear(64, 64), GatedMLP(64, 64))
            self.head = nn.Linear(64, 96, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.part(self.embedding(tokens)))

    model = Tied()
    convert_to_fp8(model)
    rounded = model.eval()(torch.arange(96))
    restore_linear(model)
    assert model.head.weight is model.embedding.weight
    assert not any(isinstance(layer, Linear) for layer in model.modules())
    exact = model(torch.arange(96))
    assert 0 < (rounded - exact).norm().item() < 0.1 * exact.norm().item()
    torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(InvalidInput, match="itself a linear layer"):
        restore_linear(Linear(64, 64))


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_of_gradients_are_refused(kind: str) -> None:
    layer: nn.Module = KINDS[kind](64, 64)
    x = batch().requires_grad_()
    with pytest.raises(InvalidInput, match="cannot be differentiated again"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_weights(reentrant: bool) -> None:
    trained = []
    for ways in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=reentrant)):
        model = network()
        optimizer, _ = prepare(model, lr=1e-2, min_size=1)
        for seed in range(20):
            x = batch(seed).requires_grad_()
            (ways(model, x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(dense(model))
    for one, other in zip(*trained, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-3


def test_a_handle_needs_no_device() -> None:
    with torch.device("meta"):
        assert Linear(64, 64).handle.device.type == "cpu"


@pytest.mark.parametrize("kind", list(KINDS))
def test_autocast_decides_what_comes_out(kind: str) -> None:
    layer: nn.Module = KINDS[kind](64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch()).dtype == torch.bfloat16


def test_statistics_show_nan() -> None:
    model = network()
    convert_to_fp8(model)
    x = batch()
    x[0, 0] = math.nan
    with watching(model):
        model(x)
    (row,) = [row for row in statistics(model).rows if (row.name, row.tensor) == ("0", "input")]
    assert math.isnan(row.sqnr)
