"""The FP8 linear layer against float64, its scaling from call to call, and what it keeps, saves and refuses."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.fp8 import AdamW, GatedMLP, Linear, LinearSettings, NormLinear, convert_to_fp8, fused, linear
from gnome.fp8.convert import store_weight
from gnome.fp8.formats import E4M3
from gnome.fp8.gradients import GradientStore
from gnome.fp8.layout import lay_out
from gnome.fp8.scaling import Scaling, quantize_matrix


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())


def exact_twin(layer: Linear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
    twin.weight.data.copy_(layer.dense_weight())
    if layer.bias is not None and twin.bias is not None:
        twin.bias.data.copy_(layer.bias)
    return twin


def both_passes(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Output, input gradient and parameters' gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(g.to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["delayed", "current"])
@pytest.mark.parametrize(("shape", "n_out"), [((33, 96), 64), ((2, 7, 50), 30), ((1, 16), 1), ((5, 3), 200)])
def test_passes_agree_with_float64(mode: Any, shape: tuple[int, ...], n_out: int) -> None:
    torch.manual_seed(0)
    layer = Linear(shape[-1], n_out, settings=LinearSettings(scaling=mode))
    for _ in range(20):  # beyond the warm-up of delayed scaling
        x, g = torch.randn(shape), torch.randn(*shape[:-1], n_out)
        ours = both_passes(layer, x, g)
    exact = both_passes(exact_twin(layer), x.double(), g.double())
    limits = [0.05, 0.09, 0.09, 1e-6]  # E4M3 products; E5M2 output gradients; the bias is exact
    for number, (a, b, limit) in enumerate(zip(ours, exact, limits, strict=True)):
        assert relative(a, b) < limit * (3 if b.numel() < 40 else 1), f"tensor {number}"


def test_what_is_kept_for_backward_is_one_byte_a_number() -> None:
    layer = Linear(256, 128, bias=False, dtype=torch.bfloat16)
    plain = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    x = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[str, int] = {}
    for name, module in (("fp8", layer), ("bf16", plain)):
        own = {p.data_ptr() for p in module.parameters()}
        kept[name] = 0

        def count(t: Tensor, name: str = name, own: set[int] = own) -> Tensor:
            kept[name] += t.nbytes if t.data_ptr() not in own and t.numel() > 100 else 0
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            module(x)
    assert kept == {"fp8": 512 * 256, "bf16": 2 * 512 * 256}


def test_empty_input_gives_empty_output_and_zero_gradients() -> None:
    layer = Linear(32, 16)
    y, dx, dw, db = both_passes(layer, torch.zeros(0, 32), torch.zeros(0, 16))
    assert (y.shape, dx.shape) == ((0, 16), (0, 32))
    assert not dw.any()
    assert not db.any()


def test_all_zero_input_gives_the_bias() -> None:
    layer = Linear(32, 16)
    assert layer.bias is not None
    assert torch.equal(layer(torch.zeros(3, 32)), layer.bias.detach().expand(3, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "loss"])
@pytest.mark.parametrize("mode", ["delayed", "current"])
def test_a_non_finite_step_is_skipped_and_forgotten(bad: float, where: str, mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    convert_to_fp8(model, settings=LinearSettings(scaling=mode))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        x = torch.randn(16, 64)
        target = x.clone()
        if step == 17:
            before = [p.detach().clone() for p in model.parameters()]
            if where == "input":
                x[3, 5] = bad  # saturated it would pass for a large number, and the step for a good one
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean() * (bad if step == 17 and where == "loss" else 1.0)
        loss.backward()
        optimizer.step()
        if step == 17:
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert (int(optimizer.step_count), int(optimizer.skipped_steps)) == (19, 1)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_tensor_that_outgrows_its_history_saturates_once_and_recovers() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 64, bias=False)
    twin = exact_twin(layer)
    for _ in range(20):
        layer(torch.randn(32, 64))
    large = 100 * torch.randn(32, 64)
    assert relative(layer(large), twin(large.double())) > 0.3
    assert relative(layer(large), twin(large.double())) < 0.05


def test_window_and_warm_up_are_sixteen_calls() -> None:
    scaling = Scaling(E4M3)

    def scale_of(largest: float) -> float:
        x, current = torch.full((16, 16), largest), scaling.starts_current()
        quantize_matrix(x, scaling.state, E4M3, current=current, rows=True, columns=False)
        return float(scaling.state[0])

    assert [scale_of(1.0) for _ in range(15)] == [256.0] * 15
    assert scale_of(100.0) == 4.0  # the sixteenth call still looks at its tensor
    assert [scale_of(1.0) for _ in range(17)] == [4.0] * 16 + [256.0]  # and is remembered for sixteen more


def test_the_weight_is_cast_again_after_its_scale_changed() -> None:
    layer = Linear(64, 64, bias=False)
    store_weight(layer, "fp16")
    x = torch.randn(4, 64)
    with torch.no_grad():
        before = layer.eval()(x)
        layer.weight_scale *= 2
        assert torch.equal(layer(x), before / 2)


def test_evaluation_leaves_no_trace_and_needs_no_history() -> None:
    layer = Linear(64, 32)
    layer(torch.randn(8, 64))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    with torch.no_grad():
        assert relative(layer(1e4 * torch.ones(4, 64)), exact_twin(layer)(1e4 * torch.ones(4, 64, dtype=torch.float64))) < 0.05
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change", ["in place", "data", "load", "optimizer", "copy"])
def test_the_weight_is_cast_again_after_it_changed_and_only_then(change: str) -> None:
    torch.manual_seed(0)
    layer = Linear(64, 64, bias=False)
    x = torch.randn(16, 64)
    layer(x)
    first = layer.working.operand
    layer(x)
    assert layer.working.operand is first
    if change == "in place":
        with torch.no_grad():
            layer.weight.mul_(3)
    elif change == "data":
        layer.weight.data = layer.weight.data * 3
    elif change == "load":
        layer.load_state_dict({**layer.state_dict(), "weight": 3 * layer.weight.detach()})
    elif change == "optimizer":
        optimizer = AdamW(layer.parameters(), lr=0.5)
        layer(x).sum().backward()
        optimizer.step()
    else:
        layer = copy.deepcopy(layer)
        layer.set_weight(3 * layer.dense_weight())
    assert relative(layer(x), exact_twin(layer)(x.double())) < 0.05


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_computes_the_same(backend: str) -> None:
    torch.manual_seed(0)
    layer = Linear(48, 32)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for _ in range(18):
        x, g = torch.randn(9, 48), torch.randn(9, 32)
        ours, theirs = both_passes(compiled, x, g), both_passes(twin, x, g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert layer.gradient_scaling.calls == twin.gradient_scaling.calls == 18


def test_a_sink_takes_the_weight_gradient_and_adds_micro_batches() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 64, bias=False)
    store = GradientStore(lay_out([64 * 64]), "cpu")
    layer.sink = (store, 0)
    exact = torch.zeros(64, 64)
    for _ in range(3):
        x, g = torch.randn(32, 64), torch.randn(32, 64)
        layer(x).backward(g)
        exact += g.t() @ x
    assert layer.weight.grad is None
    assert relative(store.value(0).view(64, 64), exact) < 0.1


@pytest.mark.parametrize("storage", ["as they are", "fp16", "e4m3"])
def test_saving_and_loading_continues_to_the_bit(storage: Any) -> None:
    torch.manual_seed(0)

    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
        convert_to_fp8(model, weights=storage)
        return model

    model = make()
    for layer in model:
        layer.requires_grad_(storage == "as they are")
    for _ in range(17):
        model(torch.randn(8, 64))
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    again = make()
    again.load_state_dict(torch.load(saved, weights_only=True))
    x = torch.randn(8, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_plain_weights_load_into_scaled_ones() -> None:
    plain = nn.Sequential(nn.Linear(64, 32))
    model = nn.Sequential(nn.Linear(64, 32))
    convert_to_fp8(model, weights="fp16")
    state = plain.state_dict()
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert relative(model[0].dense_weight(), plain[0].weight) < 1e-3


def test_a_wrong_or_missing_scale_is_said_clearly() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    convert_to_fp8(model, weights="fp16")
    state = model.state_dict()
    cases = {
        r"0\.weight: its scale is -1\.0": {**state, "0.weight_scale": torch.tensor(-1.0)},
        r"0\.weight: its scale is nan": {**state, "0.weight_scale": torch.tensor(torch.nan)},
        r"0\.weight: saved as torch\.float16 without its weight_scale": {k: v for k, v in state.items() if k != "0.weight_scale"},
        r"0\.weight: its scale is torch\.float32 of shape \(2,\)": {**state, "0.weight_scale": torch.ones(2)},
    }
    for message, broken in cases.items():
        with pytest.raises(InvalidCheckpoint, match=message):
            model.load_state_dict(broken)
    plain = nn.Sequential(nn.Linear(64, 32))
    convert_to_fp8(plain)
    with pytest.raises(InvalidCheckpoint, match=r"saved as torch\.float16 with a scale, the layer stores torch\.float32"):
        plain.load_state_dict(state)


def test_scaled_weights_need_their_optimizer() -> None:
    layer = Linear(64, 32)
    store_weight(layer, "fp16")
    with pytest.raises(InvalidInput, match=r"only gnome\.fp8\.AdamW updates"):
        layer(torch.randn(4, 64))
    layer.requires_grad_(False)
    assert layer(torch.randn(4, 64)).shape == (4, 32)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"takes 64 features, the input has shape \(4, 63\)"):
        Linear(64, 32)(torch.randn(4, 63))
    with pytest.raises(InvalidInput, match="not 0 and 32"):
        Linear(0, 32)
    with pytest.raises(InvalidInput, match=r"the input has shape \(\)"):
        Linear(64, 32)(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_real_floating_point_numbers_are_taken(dtype: torch.dtype) -> None:
    x = torch.ones(4, 64).to(dtype)
    for layer in (Linear(64, 32), NormLinear(64, 32), GatedMLP(64, 32)):
        with pytest.raises(InvalidInput, match=f"floating-point numbers, the input is {dtype}"):
            layer(x)


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(InvalidInput, match="scaling is 'block', expected delayed or current"):
        LinearSettings(scaling="block")  # type: ignore[arg-type]


def test_autocast_decides_the_dtype_of_the_output() -> None:
    layer = Linear(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 64)).dtype == torch.bfloat16
    assert layer(torch.randn(4, 64)).dtype == torch.float32


def test_a_gpu_without_fp8_falls_back_to_bf16_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_fp8_gemm", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    with pytest.warns(
        UserWarning, match=r"Old GPU does not multiply FP8 matrices \(compute capability 8\.9 is needed\); using BF16"
    ) as seen:
        answers = [linear.fp8_available(torch.device("cuda:0")) for _ in range(2)]
    assert answers == [False, False]
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["linear", "norm linear", "gated mlp"])
def test_the_fall_back_computes_and_delivers_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, fused):
        monkeypatch.setattr(module, "fp8_available", lambda _: False)
    torch.manual_seed(0)
    layer = {"linear": lambda: Linear(64, 64), "norm linear": lambda: NormLinear(64, 64), "gated mlp": lambda: GatedMLP(64, 64)}[
        kind
    ]()
    model = nn.Sequential(layer)
    convert_to_fp8(model, weights="fp16")
    optimizer = AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        x = torch.randn(32, 64)
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]
