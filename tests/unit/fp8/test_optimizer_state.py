"""What the optimizer keeps between steps, how it is saved, and which parameters a step touches."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.fp8 import AdamW, convert_to_fp8
from gnome.fp8 import Linear as Fp8Linear
from gnome.fp8.formats import E4M3
from gnome.fp8.optimizer_state import States

STATES: tuple[States, ...] = ("block", "fp8lm", "fp32")
WEIGHTS = ("fp32", "bf16", "fp16", "e4m3")
COMBINATIONS = list(itertools.product(STATES, WEIGHTS))
SIZES = (48, 96, 64)
BATCH = 16


def make_model(weights: str, seed: int = 0) -> nn.Sequential:
    """Two FP8 layers and a norm between them; weights of a dtype or stored times a scale."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*SIZES[:2]), nn.SiLU(), nn.LayerNorm(SIZES[1]), nn.Linear(*SIZES[1:]))
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    convert_to_fp8(model, weights=weights if weights in {"fp16", "e4m3"} else "as they are")
    return model


def make_optimizer(model: nn.Module, states: States, **settings: Any) -> AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return AdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, "states": states, "seed": 5, "gradient_clip": 1.0} | settings)


def make_pair(states: States, weights: str, seed: int = 0, **settings: Any) -> tuple[nn.Sequential, AdamW]:
    model = make_model(weights, seed)
    return model, make_optimizer(model, states, **settings)


def backward(model: nn.Module, step: int) -> float:
    """Back-propagate the loss of one batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    dtype = torch.bfloat16 if next(model.parameters()).dtype == torch.bfloat16 else torch.float32
    x = torch.randn(BATCH, SIZES[0], generator=generator).to(dtype)
    target = torch.randn(BATCH, SIZES[2], generator=generator).to(dtype)
    loss = functional.mse_loss(model(x), target)
    loss.backward()
    return float(loss.detach())


def train(model: nn.Module, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def tensors(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested states into paths and leaves."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{path}/{key}")
    else:
        yield path, state


def assert_same_bits(ours: Any, theirs: Any) -> None:
    found, expected = dict(tensors(ours)), dict(tensors(theirs))
    assert list(found) == list(expected)
    for path, value in expected.items():
        if isinstance(value, Tensor):
            assert found[path].dtype == value.dtype, path
            assert torch.equal(found[path].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), path
        else:
            assert found[path] == value, path


def everything(model: nn.Module, optimizer: AdamW) -> dict[str, Any]:
    return copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("states", "weights"), COMBINATIONS)
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(states: States, weights: str) -> None:
    unbroken, its_optimizer = make_pair(states, weights)
    train(unbroken, its_optimizer, range(6))
    first, optimizer = make_pair(states, weights)
    train(first, optimizer, range(3))
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second, resumed = make_pair(states, weights, seed=1)  # other weights, to be overwritten
    train(second, resumed, range(1))
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_same_bits(everything(second, resumed), saved)
    train(second, resumed, range(3, 6))
    assert_same_bits(everything(second, resumed), everything(unbroken, its_optimizer))
    assert int(resumed.step_count) == 6


@pytest.mark.parametrize(("states", "weights"), [("block", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "e4m3")])
def test_rounding_is_random_by_seed_and_step(states: States, weights: str) -> None:
    results = []
    for seed in (5, 5, 6):
        model, optimizer = make_pair(states, weights, seed=0) if seed == 5 else make_pair(states, weights)
        for arena in optimizer.arenas:
            arena.seed = seed
        train(model, optimizer, range(2))
        results.append(torch.cat([p.detach().float().reshape(-1) for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_state_is_a_snapshot() -> None:
    model, optimizer = make_pair("block", "e4m3", lr=torch.tensor(1e-2))
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    train(model, optimizer, range(2, 4))
    optimizer.param_groups[0]["lr"].fill_(5.0)
    assert_same_bits(saved, kept)


Edit = Callable[[dict[str, Any]], object]


def replace(number: int, **pieces: Any) -> Edit:
    return lambda saved: saved["arenas"][0][number].update(pieces)


def remove(number: int, name: str) -> Edit:
    return lambda saved: saved["arenas"][0][number].pop(name)


N = SIZES[0] * SIZES[1]
WRONG_PIECES: dict[str, tuple[Edit, str]] = {
    **{f"no {name}": (remove(1, name), rf"arena 0, parameter 1.*{name}.*missing") for name in ("first", "second")},
    **{f"no {name}": (remove(0, name), rf"parameter 0.*{name}.*missing") for name in ("first_scale", "second_scale", "master")},
    "no weight_scale": (remove(1, "weight_scale"), r"arena 0, parameter 1.*weight_scale"),
    "no weight_amax": (remove(1, "weight_amax"), r"arena 0, parameter 1.*weight_amax"),
    "negative first_scale": (replace(0, first_scale=-torch.ones(N // 128)), r"parameter 0, first_scale: its scale is -1.0"),
    "infinite second_scale": (replace(0, second_scale=torch.full((N // 128,), torch.inf)), r"second_scale: its scale is inf"),
    "zero weight_scale": (replace(1, weight_scale=torch.tensor(0.0)), r"parameter 1, weight_scale: its scale is 0.0"),
    "NaN weight_amax": (replace(1, weight_amax=torch.tensor(torch.nan)), r"parameter 1.*weight_amax"),
    "FP32 first": (replace(0, first=torch.zeros(N)), rf"first is torch.float32 \({N},\), expected torch.float8_e4m3fn \({N},\)"),
    "short second": (replace(0, second=torch.zeros(5, dtype=E4M3.dtype)), rf"second is .* \(5,\), expected .* \({N},\)"),
    "BF16 master": (replace(0, master=torch.zeros(N, dtype=torch.bfloat16)), r"master is torch.bfloat16.*expected torch.float16"),
    "other kind": (lambda saved: saved.update(states="fp32"), r"'fp32', this optimizer keeps 'block'"),
    "one parameter less": (lambda saved: saved["arenas"][0].pop(), r"states of 1 parameters, expected 2"),
    "one vector less": (lambda saved: saved["exact"].pop(), r"other parameters"),
    "one arena more": (lambda saved: saved["arenas"].append([]), r"other parameters"),
    "one group less": (lambda saved: saved["param_groups"].pop(), r"parameter groups"),
    "no vector's second": (lambda saved: saved["exact"][2].pop("second"), r"second"),
    "a vector of another shape": (lambda saved: saved["exact"][0].update(first=torch.zeros(1)), r"first"),
    "a vector of another dtype": (lambda saved: saved["exact"][0].update(second=torch.zeros(SIZES[1]).half()), r"second"),
    "no vector's steps": (lambda saved: saved["exact"][1].pop("steps"), r"steps"),
    **{
        f"no {name} at all": (lambda saved, name=name: saved.pop(name), rf"without {name}$")
        for name in ("states", "param_groups", "step_count", "skipped_steps", "arenas", "exact")
    },
}


@pytest.mark.parametrize("wrong", WRONG_PIECES)
def test_a_wrong_piece_is_named(wrong: str) -> None:
    model, optimizer = make_pair("block", "e4m3")
    train(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    edit, message = WRONG_PIECES[wrong]
    edit(saved)
    _, other = make_pair("block", "e4m3", seed=1)
    with pytest.raises(InvalidCheckpoint, match=message) as raised:
        other.load_state_dict(saved)
    assert "\n" not in str(raised.value)


def test_states_of_another_kind_are_refused() -> None:
    saved = {states: make_pair(states, "fp32")[1].state_dict() for states in STATES}
    for ours, theirs in itertools.permutations(STATES, 2):
        with pytest.raises(InvalidCheckpoint, match=f"'{theirs}', this optimizer keeps '{ours}'"):
            make_pair(ours, "fp32")[1].load_state_dict(saved[theirs])


@pytest.mark.parametrize("move", ["dtype", "data"])
def test_parameters_moved_after_construction_are_refused(move: str) -> None:
    model, optimizer = make_pair("block", "fp32")
    if move == "dtype":
        model.to(torch.bfloat16)
    else:
        model[3].weight.data = model[3].weight.data.clone()
    backward(model, 0)
    with pytest.raises(
        InvalidInput, match=r"parameter \d of shape \(\d+, \d+\) was moved or replaced after the optimizer was made"
    ):
        optimizer.step()


def test_parameters_on_two_devices_are_refused() -> None:
    parameters = [nn.Parameter(torch.zeros(80, 80, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(InvalidInput, match="parameters lie on cpu and meta"):
        AdamW(parameters)


@pytest.mark.parametrize(("states", "weights"), COMBINATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(states: States, weights: str, bad: float) -> None:
    model, optimizer = make_pair(states, weights)
    for steps in range(2):  # before any step, and after one
        before = everything(model, optimizer)
        dense = [model[i].dense_weight() for i in (0, 3)]
        x = torch.randn(BATCH, SIZES[0]).to(torch.bfloat16 if weights == "bf16" else torch.float32)
        with torch.no_grad():
            model.eval()
            output = model(x)
            model.train()
        for parameter in (model[0].weight, model[3].bias):
            if parameter.ndim > 1:
                values = torch.randn(SIZES[1], SIZES[0])
                values[3, 5] = bad
                store, index = model[0].sink
                store.add(index, values)
            else:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        after = everything(model, optimizer)
        assert int(after["optimizer"].pop("skipped_steps")) == int(before["optimizer"].pop("skipped_steps")) + 1
        assert_same_bits(after, before)
        assert all(torch.equal(model[i].dense_weight(), w) for i, w in zip((0, 3), dense, strict=True))
        model.eval()
        assert torch.equal(model(x), output)
        model.train()
        train(model, optimizer, range(1))
        assert int(optimizer.step_count) == steps + 1
    assert int(optimizer.skipped_steps) == 2


@pytest.mark.parametrize("states", STATES)
def test_e4m3_weights_follow_their_masters_as_these_grow(states: States) -> None:
    model, optimizer = make_pair(states, "e4m3", lr=0.1, weight_decay=0.0)
    largest = float(model[0].dense_weight().abs().max())
    train(model, optimizer, range(10))
    (arena,) = optimizer.arenas
    for number in (0, 3):
        layer = model[number]
        index = next(i for i, p in enumerate(arena.parameters) if p is layer.weight)
        master = arena.layout.part(arena.weights, index).float() / arena.weight_scale[index]
        torch.testing.assert_close(layer.dense_weight().reshape(-1), master, rtol=1 / 16, atol=float(master.abs().max()) * 1e-4)
    assert float(model[0].dense_weight().abs().max()) > 2 * largest


@pytest.mark.parametrize("states", STATES)
def test_fp16_weights_may_grow_and_shrink(states: States) -> None:
    (narrow, optimizer), (wide, its_optimizer) = (make_pair(states, weights, gradient_clip=None) for weights in ("fp16", "fp32"))
    largest = []
    for lr, decay in ((1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (0.5, 1.99), (0.01, 0.0), (0.0, 0.0)):
        for model, own in ((narrow, optimizer), (wide, its_optimizer)):
            own.param_groups[0].update(lr=lr, weight_decay=decay)
            store, index = model[0].sink
            store.add(index, torch.ones(SIZES[1], SIZES[0]))
            own.step()
            own.zero_grad()
        largest.append(float(wide[0].weight.detach().abs().max()))
        assert torch.isfinite(narrow[0].weight).all()
        # Each of the steps so far rounded a weight of at most the largest size so far to 11 bits; FP8-LM's largest number is in the last
        # binade of FP16, ours six below it.
        torch.testing.assert_close(
            narrow[0].dense_weight(), wide[0].weight.detach(), rtol=0, atol=len(largest) * max(largest) * 2.0**-10
        )
    assert largest[2] > 6
    assert largest[-1] < 1


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("states", STATES)
def test_a_learning_rate_schedule(states: States, as_tensor: bool) -> None:
    def factor(step: int) -> float:
        return 0.5**step

    scheduled, by_hand = make_pair(states, "fp16"), make_pair(states, "fp16")
    if as_tensor:
        for group in scheduled[1].param_groups:
            group["lr"] = torch.tensor(group["lr"])
    schedule = torch.optim.lr_scheduler.LambdaLR(scheduled[1], factor)
    rates = [group["lr"] for group in by_hand[1].param_groups]
    for step in range(4):
        train(*scheduled, range(step, step + 1))
        schedule.step()
        for group, rate in zip(by_hand[1].param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        train(*by_hand, range(step, step + 1))
        assert [float(group["lr"]) for group in scheduled[1].param_groups] == pytest.approx([r * factor(step + 1) for r in rates])
    for ours, theirs in zip(scheduled[0].parameters(), by_hand[0].parameters(), strict=True):
        if as_tensor:  # the vectors' rate is FP32 then, and a number before
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=float(theirs.detach().float().abs().max()) * 1e-3)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("states", STATES)
def test_a_schedule_resumes(states: States) -> None:
    def make(seed: int) -> tuple[nn.Sequential, AdamW, torch.optim.lr_scheduler.LambdaLR]:
        model, optimizer = make_pair(states, "fp16", seed)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def run(model: nn.Sequential, optimizer: AdamW, schedule: torch.optim.lr_scheduler.LambdaLR, steps: range) -> None:
        for step in steps:
            train(model, optimizer, range(step, step + 1))
            schedule.step()

    unbroken, first, second = make(0), make(0), make(1)
    run(*unbroken, range(4))
    run(*first, range(2))
    saved = through_a_file(dict(zip(("model", "optimizer", "schedule"), (part.state_dict() for part in first), strict=True)))
    for part, state in zip(second, saved.values(), strict=True):
        part.load_state_dict(state)
    run(*second, range(2, 4))
    assert_same_bits(everything(*second[:2]), everything(*unbroken[:2]))


def test_a_tensor_learning_rate_is_read_at_every_step() -> None:
    rate = torch.tensor(0.0)
    model, optimizer = make_pair("block", "fp32", lr=rate)
    before = model[0].weight.detach().clone()
    train(model, optimizer, range(1))
    assert torch.equal(model[0].weight, before)
    rate.fill_(1e-2)
    train(model, optimizer, range(1))
    assert not torch.equal(model[0].weight, before)


def exact_gradient(shape: tuple[int, ...], seed: int) -> Tensor:
    """Powers of two of either sign, which E4M3 holds."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    return signs * 2.0 ** torch.randint(-4, 5, shape, generator=generator)


def test_parameter_groups_act_apart() -> None:
    settings = [
        {"lr": 1e-2, "weight_decay": 0.5},
        {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.5, 0.9)},
        {"lr": 0.0, "weight_decay": 0.3, "eps": 1e-2},
        {"lr": 3e-2, "eps": 1.0},
    ]
    shapes = ((80, 80), (70,))  # a compact and an exact one in each group
    starts = [[torch.randn(shape, generator=torch.Generator().manual_seed(i)) for shape in shapes] for i in range(len(settings))]
    ours, theirs = ([[nn.Parameter(p.clone()) for p in group] for group in starts] for _ in range(2))
    together = AdamW([{"params": group, **own} for group, own in zip(ours, settings, strict=True)], states="fp32")
    torchs = torch.optim.AdamW([{"params": group, **own} for group, own in zip(theirs, settings, strict=True)])
    for step in range(5):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            for p, q in zip(mine, other, strict=True):
                q.grad = exact_gradient(q.shape, 10 * step + number)
                p.backward(q.grad)
        together.step()
        together.zero_grad()
        torchs.step()
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine, other, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours[2][0], starts[2][0])  # a rate of zero decays nothing either


@pytest.mark.parametrize(("states", "weights"), COMBINATIONS)
def test_parameters_without_a_gradient_are_left_alone(states: States, weights: str) -> None:
    model, optimizer = make_pair(states, weights)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    for step in range(2):
        model[3](torch.randn(BATCH, SIZES[1], generator=torch.Generator().manual_seed(step)).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = everything(model, optimizer)
    numbers = {name: i for i, (name, _) in enumerate((n, p) for n, p in model.named_parameters() if p.ndim > 1)}
    vectors = {name: i for i, (name, _) in enumerate((n, p) for n, p in model.named_parameters() if p.ndim <= 1)}
    for state in (before, after):
        state["untouched"] = [
            {name: value for name, value in state["model"].items() if not name.startswith("3.")},
            [state["optimizer"]["arenas"][0][numbers["0.weight"]]],
            [state["optimizer"]["exact"][i] for name, i in vectors.items() if not name.startswith("3.")],
        ]
    assert_same_bits(after["untouched"], before["untouched"])
    for name in ("3.weight", "3.bias"):
        assert not torch.equal(after["model"][name].float(), before["model"][name].float())
    moved = [state["optimizer"]["arenas"][0][numbers["3.weight"]]["first"].float() for state in (before, after)]
    assert not torch.equal(*moved)


@pytest.mark.parametrize("states", STATES)
def test_frozen_parameters_are_left_alone(states: States) -> None:
    model = make_model("fp32")
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    optimizer = make_optimizer(model, states)
    before = model[3].weight.detach().clone()
    train(model, optimizer, range(2))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), frozen, strict=True))
    assert not torch.equal(model[3].weight, before)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 80)
        self.head = nn.Linear(80, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("states", STATES)
def test_an_embedding_and_a_head_share_one_weight(states: States) -> None:
    torch.manual_seed(0)
    model, reference = Tied(), Tied()
    reference.load_state_dict(model.state_dict())
    report = convert_to_fp8(model)
    assert report.converted == ("head",)
    assert isinstance(model.head, Fp8Linear)
    optimizer = AdamW(model.parameters(), lr=1e-2, states=states)
    assert [p.shape for p, _ in optimizer.members] == [(64, 80)]
    tokens = torch.arange(64)

    def loss_of(net: nn.Module) -> Tensor:
        return functional.cross_entropy(net(tokens), tokens.roll(1))

    loss_of(model).backward()
    loss_of(reference).backward()
    found = optimizer.gradient(model.embedding.weight)
    expected = reference.embedding.weight.grad
    assert found is not None
    assert expected is not None
    assert model.embedding.weight.grad is None
    assert float((found - expected).norm() / expected.norm()) < 0.06  # both parts, of an FP8 product
    optimizer.zero_grad()
    losses = []
    for _ in range(40):
        losses.append(float(loss_of(model).detach()))
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model.head.weight is model.embedding.weight
    assert losses[-1] < 0.5 * losses[0]
    x = model.embedding(tokens).detach()
    model.eval()
    exact = x @ model.embedding.weight.detach().t()
    assert float((model.head(x).detach() - exact).norm() / exact.norm()) < 0.05  # of the weight as it is now
