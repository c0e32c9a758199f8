"""The optimizer beside torch's AdamW, and the two traps of few bits: a frozen second moment and lost small updates."""

from typing import Any

import pytest
import torch
from torch import nn

from gnome.errors import InvalidInput
from gnome.fp8 import AdamW, convert_to_fp8, state_bytes
from gnome.fp8.optimizer_state import States


def drive(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[torch.Tensor], rates: list[float]
) -> list[torch.Tensor]:
    """Apply gradients one after the other; returns the updates."""
    updates = []
    for gradient, rate in zip(gradients, rates, strict=True):
        before = weight.detach().clone()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate
        (weight * gradient).sum().backward()
        optimizer.step()
        updates.append(weight.detach() - before)
    return updates


def spread_gradients(steps: int, sigma: float) -> list[torch.Tensor]:
    """Normal gradients of a 64 x 128 matrix with log-normal rows and columns, that fall tenfold half way."""
    generator = torch.Generator().manual_seed(0)
    scale = (
        1e-3
        * torch.exp(sigma * torch.randn(64, 1, generator=generator))
        * torch.exp(sigma * torch.randn(1, 128, generator=generator))
    )
    drift = 0.3 * torch.randn(64, 128, generator=generator)
    return [
        (torch.randn(64, 128, generator=generator) + drift) * scale * (1.0 if step < steps // 2 else 0.1) for step in range(steps)
    ]


def gain_and_error(states: States, beta2: float, sigma: float, steps: int) -> tuple[float, float]:
    """How large the last updates are beside exact ones, and their relative error."""
    gradients = spread_gradients(steps, sigma)
    updates = {}
    for name in ("exact", "ours"):
        weight = nn.Parameter(torch.zeros(64, 128))
        settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, beta2), "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([weight], **settings) if name == "exact" else AdamW([weight], states=states, **settings)
        updates[name] = torch.stack(drive(optimizer, weight, gradients, [1e-3] * steps)[-20:])
    exact, ours = updates["exact"], updates["ours"]
    return float((ours * exact).sum() / exact.square().sum()), float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_block_states_follow_exact_adam_also_after_gradients_fall(beta2: float, sigma: float) -> None:
    gain, error = gain_and_error("block", beta2, sigma, 300)
    assert 0.9 < gain < 1.1
    assert error < 0.35


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.95), (0.98, 0.999)])
def test_a_weight_whose_gradient_has_gone_comes_to_rest(betas: tuple[float, float]) -> None:
    """Rounded to nearest the first moment stays where it is, while the second falls, and the weight runs away."""
    distances = {}
    gradients = [g * (1.0 if step < 20 else 0.0) for step, g in enumerate(spread_gradients(200, 1.0))]
    for name, kind in (("exact", torch.optim.AdamW), ("ours", AdamW)):
        weight = nn.Parameter(torch.zeros(64, 128))
        optimizer = kind([weight], lr=1e-3, betas=betas, weight_decay=0.0)
        updates = drive(optimizer, weight, gradients, [1e-3] * len(gradients))
        distances[name] = float(weight.detach().abs().mean())
        if name == "ours":
            assert max(float(update.abs().max()) for update in updates) < 5e-3
    assert distances["ours"] == pytest.approx(distances["exact"], rel=0.25)


@pytest.mark.parametrize("states", ["fp8lm", "fp32"])
def test_other_states_follow_exact_adam_on_even_gradients(states: States) -> None:
    gain, error = gain_and_error(states, 0.95, 0.0, 200)
    assert 0.95 < gain < 1.05
    assert error < (0.12 if states == "fp8lm" else 0.06)


def test_fp32_states_and_weights_differ_from_torch_by_the_gradient_s_rounding_alone() -> None:
    exact_gradients = [
        g.div(2**-10).round().clamp(-7, 7).mul(2.0**-10) for g in spread_gradients(30, 0.0)
    ]  # E4M3 has these numbers
    weights = [nn.Parameter(torch.ones(64, 128)) for _ in range(2)]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    drive(AdamW([weights[0]], states="fp32", **settings), weights[0], exact_gradients, [1e-2] * 30)
    drive(torch.optim.AdamW([weights[1]], **settings), weights[1], exact_gradients, [1e-2] * 30)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("states", "arrives"), [("block", True), ("fp8lm", False)])
def test_updates_below_the_spacing_of_fp16_arrive_on_average(states: States, arrives: bool) -> None:
    """With a steady gradient every step is -lr; FP16 of 0.02 is spaced by 1.5e-5, and lr is 1e-6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    model[0].weight.data.uniform_(0.0157, 0.0311)
    before = model[0].weight.detach().clone()
    convert_to_fp8(model, weights="fp16")
    optimizer = AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, states=states)
    for _ in range(50):
        optimizer.zero_grad()
        model(torch.ones(4, 128)).sum().backward()
        optimizer.step()
    moved = float((before - model[0].dense_weight()).mean())
    assert (0.8 < moved / 50e-6 < 1.1) if arrives else moved < 0.1 * 50e-6


def test_the_gradient_is_clipped_over_all_parameters_together() -> None:
    weight, bias = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(8))
    optimizer = AdamW([weight, bias], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, gradient_clip=1.0)
    (3.0 * weight.sum() + 4.0 * bias.sum()).backward()
    optimizer.step()
    norm = (9 * 4096 + 16 * 8) ** 0.5
    assert float(optimizer.gradient_norm) == pytest.approx(norm, rel=1e-5)
    for parameter, g in ((weight, 3 / norm), (bias, 4 / norm)):
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -g / (g + 1.0)), rtol=1e-4, atol=1e-6)


def test_gradients_leave_the_parameters_and_can_be_read() -> None:
    weight, bias = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(8))
    optimizer = AdamW([weight, bias])
    (2.0 * weight.sum() + bias.sum()).backward()
    assert weight.grad is None
    gradients = optimizer.gradient(weight), optimizer.gradient(bias)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], torch.full((64, 64), 2.0))
    assert torch.equal(gradients[1], torch.ones(8))
    optimizer.zero_grad()
    assert optimizer.gradient(weight) is None


def test_bytes_a_parameter() -> None:
    for states, expected in (("block", 5.1), ("fp8lm", 6.001), ("fp32", 11.04)):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
        convert_to_fp8(model, weights="fp16")
        counted = state_bytes(AdamW(model.parameters(), states=states))  # type: ignore[arg-type]
        assert expected - 0.05 < counted.per_parameter <= expected
        assert counted.working_copies == 0
    assert "5.0" not in str(counted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": "int8"}, "states is 'int8', expected block, fp8lm or fp32"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"weight_decay": float("inf")}, "weight_decay inf"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "two betas"),
        ({"gradients": "row"}, "gradients is 'row', expected block, tensor or None"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0"),
        ({"gradient_clip": float("nan")}, "gradient_clip is nan"),
        ({"min_size": -1}, "min_size is -1"),
        ({"seed": -1}, "seed -1"),
        ({"sharding": "rows"}, "sharding is 'rows'"),
        ({"states": "fp8lm", "sharding": "even"}, "sharding='whole'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        AdamW([nn.Parameter(torch.zeros(64, 64))], **settings)


def test_settings_of_a_group_are_checked_too() -> None:
    with pytest.raises(InvalidInput, match="lr -1"):
        AdamW([{"params": [nn.Parameter(torch.zeros(64, 64))], "lr": -1.0}])


def test_parameters_cannot_be_added_later_and_one_must_be_trainable() -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(64, 64))])
    with pytest.raises(InvalidInput, match="cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(64, 64))]})
    with pytest.raises(InvalidInput, match="no parameter that requires a gradient"):
        AdamW([nn.Parameter(torch.zeros(64, 64), requires_grad=False)])


def test_a_parameter_is_listed_once() -> None:
    weight = nn.Parameter(torch.zeros(64, 64))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(InvalidInput, match="a parameter twice"):
        AdamW([weight, weight])


def test_a_step_without_gradients_is_none() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW([weight], lr=1e-2)
    optimizer.step()
    assert torch.equal(weight, torch.ones(64, 64))
    assert int(optimizer.step_count) == 0


def test_a_gradient_set_by_hand_is_looked_at_too() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW([weight], lr=1e-2, gradient_clip=0.5)
    weight.grad = torch.full((64, 64), float("nan"))
    optimizer.step()
    assert torch.equal(weight, torch.ones(64, 64))
    assert int(optimizer.skipped_steps) == 1
    optimizer.zero_grad()
    weight.grad = torch.ones(64, 64)
    optimizer.step()
    assert float(optimizer.gradient_norm) == 64.0


def test_a_grad_scaler_is_refused() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer, scaler = AdamW([weight]), torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(InvalidInput, match="needs no GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    weight.sum().backward()
    optimizer.step()


def test_gradients_set_by_hand_are_used() -> None:
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones(64, 64)
    optimizer = AdamW([weight], lr=1e-2, weight_decay=0.0)
    optimizer.step()
    assert weight.grad is None
    torch.testing.assert_close(weight.detach(), torch.full((64, 64), -1e-2), rtol=0.1, atol=0)
