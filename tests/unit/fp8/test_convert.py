"""What conversion replaces, what it leaves and why, and the way back."""

import pytest
import torch
import torch_geometric.nn
from torch import nn

from gnome.errors import InvalidInput
from gnome.fp8 import LEVELS, AdamW, Linear, convert_to_fp8, prepare, restore_linear, state_bytes


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(64, 32)
        self.again = self.plain
        self.graph = torch_geometric.nn.Linear(32, 48)
        self.lazy = torch_geometric.nn.Linear(-1, 48)
        self.readout = nn.Linear(48, 1)
        self.double = nn.Linear(32, 32, dtype=torch.float64)
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda *_: None)
        self.inner = nn.ModuleDict({"head": nn.Linear(48, 64, bias=False), "norm": nn.LayerNorm(64)})
        self.missing = None
        self.attention = nn.MultiheadAttention(32, 2)


def test_torch_and_graph_layers_are_converted_and_the_rest_is_explained() -> None:
    model = Mixed()
    weight = model.graph.weight
    report = convert_to_fp8(model, lambda name, _: not name.startswith("attention"))
    assert set(report.converted) == {"plain", "again", "graph", "inner.head"}
    assert isinstance(model.graph, Linear)
    assert model.graph.weight is weight
    assert model.plain is model.again
    reasons = dict(report.kept)
    assert set(reasons) == {"lazy", "readout", "double", "hooked", "attention.out_proj"}
    assert reasons["attention.out_proj"] == "it is a NonDynamicallyQuantizableLinear, not a plain linear layer"
    assert reasons["readout"] == "48 -> 1 is narrower than 16"
    assert "not known before the first call" in reasons["lazy"]
    assert "float64" in reasons["double"]
    assert "hooks" in reasons["hooked"]
    assert "4 linear layers in FP8, 5 as they were" in str(report)


def test_the_filter_and_the_least_width_are_heard() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 256), nn.Linear(256, 256))
    report = convert_to_fp8(model, lambda name, _: name != "2", min_features=64)
    assert report.converted == ("0", "1")
    assert report.kept == (("2", "filtered out"),)
    assert convert_to_fp8(model, min_features=512).kept == (("2", "256 -> 256 is narrower than 512"),)


def test_a_bare_linear_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(InvalidInput, match="from_weight"):
        convert_to_fp8(nn.Linear(64, 64))


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(InvalidInput, match="weights is 'int4', expected 'as they are', 'fp16' or 'e4m3'"):
        convert_to_fp8(nn.Sequential(nn.Linear(64, 64)), weights="int4")  # type: ignore[arg-type]


def test_restoring_gives_back_plain_layers_with_the_true_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    shared = nn.Sequential(model, nn.ModuleList([model[0]]))
    before = [p.detach().clone() for p in model.parameters()]
    keys = list(shared.state_dict())
    convert_to_fp8(shared, weights="fp16")
    restore_linear(shared)
    assert list(shared.state_dict()) == keys
    assert shared[1][0] is shared[0][0]
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("level", list(LEVELS))
def test_every_level_learns_and_stores_what_it_says(level: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.GELU(), nn.Linear(256, 64, bias=False))
    optimizer, report = prepare(model, level, lr=2e-3, gradient_clip=1.0)
    assert len(report.converted) == 2
    losses = []
    for _ in range(60):
        x = torch.randn(64, 64)
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    n_bytes = state_bytes(optimizer)
    expected = {"O1": 11.1, "O2": 6.01, "O3": 6.01, "default": 5.1}[level]
    assert expected - 0.1 < n_bytes.per_parameter <= expected
    assert model[0].weight.dtype == {"fp16": torch.float16, "e4m3": torch.float8_e4m3fn}[LEVELS[level].weights]
    assert n_bytes.working_copies >= 2 * n_bytes.parameters


def test_an_unknown_level_names_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="no level 'O4'; there are O1, O2, O3, default"):
        prepare(nn.Sequential(nn.Linear(64, 64)), "O4")


def test_weight_decay_is_for_matrices() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer, _ = prepare(model, weight_decay=0.3)
    assert isinstance(optimizer, AdamW)
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in optimizer.param_groups] == [
        (0.3, [2]),
        (0.0, [1]),
    ]


def test_a_weight_that_other_modules_use_stays_as_it_is() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False), "inner": nn.Linear(32, 32)})
    model["head"].weight = model["embedding"].weight
    before = model["embedding"].weight.detach().clone()
    report = convert_to_fp8(model, weights="fp16")
    assert report.shared == ("head",)
    assert "head: other modules use its weight" in str(report)
    assert model["embedding"].weight is model["head"].weight
    assert torch.equal(model["embedding"].weight, before)
    assert model["inner"].weight.dtype == torch.float16
