"""The fused parts of a transformer layer against the same parts one by one, and against float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.errors import InvalidInput
from gnome.fp8 import AdamW, GatedMLP, LinearSettings, NormLinear, convert_to_fp8, statistics, watching


def reference(module: nn.Module, x: Tensor) -> Tensor:
    gain = module.gain.double()
    unit = functional.rms_norm(x.double(), gain.shape, gain, module.eps)
    if isinstance(module, NormLinear):
        return functional.linear(unit, module.linear.weight.double())
    gate, up = functional.linear(unit, module.up.weight.double()).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, module.down.weight.double())


def make(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    module = NormLinear(64, 96, **settings) if kind == "norm linear" else GatedMLP(64, 128, **settings)
    module.gain.data.uniform_(0.5, 1.5)
    return module


def gradients(module: nn.Module, y: Tensor, x: Tensor, g: Tensor) -> list[Tensor]:
    module.zero_grad()
    x.grad = None
    y.backward(g.to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("mode", ["delayed", "current"])
@pytest.mark.parametrize("kind", ["norm linear", "gated mlp"])
def test_fused_parts_agree_with_float64(kind: str, mode: Any, backend: str | None) -> None:
    module = make(kind, settings=LinearSettings(scaling=mode))
    call = module if backend is None else torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(20):
        x = torch.randn(3, 37, 64, requires_grad=True)
        y = call(x)
        g = torch.randn_like(y)
        ours = gradients(module, y, x, g)
    exact = gradients(module, reference(module, x), x, g)
    for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < 0.12, f"tensor {number}: {error}"


def test_what_is_kept_is_the_input_and_the_gates() -> None:
    module = make("gated mlp", dtype=torch.bfloat16)
    x = torch.randn(256, 64, dtype=torch.bfloat16, requires_grad=True)
    own = {p.data_ptr() for p in module.parameters()}
    kept: list[int] = []

    def count(t: Tensor) -> Tensor:
        if t.data_ptr() not in own and t.numel() > 256:
            kept.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        module(x)
    assert sorted(kept) == [256 * 64 * 2, 256 * 256 * 2]


def test_fused_parts_train_as_well_as_plain_ones() -> None:
    """The same weights, batches and rates: FP8 throughout beside FP32 layers and torch's AdamW."""
    ours = nn.Sequential(make("norm linear"), nn.Linear(96, 64), make("gated mlp"))
    plain = copy.deepcopy(ours)
    convert_to_fp8(ours, weights="fp16")
    target = torch.randn(64, 64) / 8
    losses = {}
    for name, model in (("ours", ours), ("plain", plain)):
        optimizer = AdamW(model.parameters(), lr=5e-3) if name == "ours" else torch.optim.AdamW(model.parameters(), lr=5e-3)
        generator = torch.Generator().manual_seed(2)
        for _ in range(150):
            x = torch.randn(64, 64, generator=generator)
            optimizer.zero_grad()
            y = model(x) if name == "ours" else reference(model[2], model[1](reference(model[0], x).float()))
            loss = (y.float() - torch.sin(x @ target)).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["plain"] < 0.2
    assert losses["ours"] < 1.1 * losses["plain"]


def test_watching_counts_without_changing_anything() -> None:
    models = [nn.Sequential(nn.Linear(64, 64), make("norm linear"), nn.Linear(96, 64), make("gated mlp")) for _ in range(2)]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    optimizers = []
    for model in models:
        convert_to_fp8(model)
        optimizers.append(AdamW(model.parameters(), lr=1e-3))
    torch.manual_seed(1)
    for step in range(20):
        x = torch.randn(16, 64)
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            with watching(model, number == 0 and step % 19 == 0):
                model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    seen = statistics(models[0], optimizers[0])
    by_kind = {
        kind: [row for row in seen.rows if row.tensor == kind]
        for kind in ("input", "output gradient", "weight", "weight gradient")
    }
    assert [len(rows) for rows in by_kind.values()] == [5, 5, 5, 5]
    assert all(30 < row.sqnr < 34 for row in by_kind["input"])
    assert all(24 < row.sqnr < 28 for row in by_kind["output gradient"])
    assert (seen.steps, seen.skipped_steps) == (20, 0)
    assert "| 3.down | input | e4m3 |" in seen.table()
    assert not [row for row in statistics(models[1]).rows if row.tensor != "weight"]


def test_statistics_count_what_is_lost(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    convert_to_fp8(model)
    for _ in range(17):
        model(torch.ones(8, 64))
    x = torch.full((8, 64), 1e-8)
    x[:, :16] = 1e4
    with watching(model):
        model(x)
    (row,) = (row for row in statistics(model).rows if row.tensor == "input")
    assert row.saturated == pytest.approx(25.0)
    assert row.underflow == pytest.approx(75.0)
    assert row.sqnr < 1
    picture = tmp_path_factory.mktemp("pictures") / "statistics.png"
    statistics(model).plot(picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="hidden is 100, which is not a multiple of 16"):
        GatedMLP(64, 100)
    with pytest.raises(InvalidInput, match="takes 64 features"):
        GatedMLP(64, 128)(torch.zeros(2, 65))
