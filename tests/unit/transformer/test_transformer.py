"""The transformer core against a reference that builds every matrix of the equations, and the symmetries it must have."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gnome.errors import InvalidInput
from gnome.fp8 import convert_to_fp8
from gnome.transformer import (
    BLOCKS,
    Block,
    Gains,
    Transformer,
    TransformerSettings,
    attention,
    parameter_groups,
    shaped_attention,
)

WIDTH, HEADS, TOKENS = 24, 3, 7
SKIPLESS = ("sas", "sasp")


def model(seed: int = 0, *, trained: bool = True, **dials: Any) -> Transformer:
    """A small transformer in float64; `trained` moves every parameter, gains and zeros too."""
    torch.manual_seed(seed)
    made = Transformer(**{"depth": 3, "width": WIDTH, "heads": HEADS, **dials}).double()
    if trained:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def set_weights(batch: int, padding: int = 0) -> Tensor:
    weights = draw(batch, TOKENS, seed=2).abs() + 0.1
    weights[:, TOKENS - padding :] = 0
    return weights


# The reference: one head and one sequence at a time, every matrix built.


def reference_norm(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    assert isinstance(norm, nn.RMSNorm)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def turned(x: Tensor) -> Tensor:
    """Turn feature pairs as complex numbers."""
    half = x.shape[1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) * 2 / x.shape[1])
    phase = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * rates
    z = torch.complex(x[:, :half], x[:, half:]) * torch.complex(phase.cos(), phase.sin()).to(torch.complex128)
    return torch.cat([z.real, z.imag], 1)


def reference_attention(block: Block, x: Tensor, weights: Tensor | None) -> Tensor:
    layer, settings = block.attention, block.settings
    n, width = x.shape[0], settings.width // settings.heads
    prior = torch.zeros(n, n, dtype=x.dtype) if weights is None else weights.log().expand(n, n)
    if settings.causal:
        prior = prior.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    values = x
    if layer.value is not None:
        matrix = layer.kept_gain * torch.eye(settings.width, dtype=x.dtype) + layer.value_gain * layer.value.weight
        values = x @ matrix.T
    projected = x @ layer.project.weight.T + layer.project.bias
    outs = []
    for head in range(settings.heads):
        own = slice(head * width, (head + 1) * width)
        q, k = (projected[:, part * settings.width :][:, own] for part in (0, 1))
        v = values[:, own] if settings.skipless else projected[:, 2 * settings.width :][:, own]
        if settings.causal and settings.rotary:
            q, k = turned(q), turned(k)
        a = torch.softmax(q @ k.T / width**0.5 + prior, 1)
        if settings.skipless:
            centre = torch.softmax(prior, 1)
            a = layer.alpha[head] * torch.eye(n, dtype=x.dtype) + layer.beta[head] * a - layer.gamma[head] * centre
        outs.append(a @ v)
    joined = torch.cat(outs, 1)
    return joined if layer.out is None else joined @ layer.out.weight.T


def reference_mlp(block: Block, x: Tensor) -> Tensor:
    h = x @ block.mlp.up.weight.T
    if block.settings.activation == "swiglu":
        gate, h = h.chunk(2, 1)
        h = gate * torch.sigmoid(gate) * h
    else:
        h = torch.where(h > 0, h, 0.0) if block.settings.activation == "relu" else nn.functional.gelu(h)
    return h @ block.mlp.down.weight.T


def reference_block(block: Block, x: Tensor, weights: Tensor | None) -> Tensor:
    normed = reference_norm(x, block.norm)
    attended = reference_attention(block, normed, weights)
    name = block.settings.block
    if name == "preln":
        y = x + attended
        return y + reference_mlp(block, reference_norm(y, block.mlp_norm))
    if name == "parallel":
        return x + attended + reference_mlp(block, normed)
    if name == "sas":
        y = block.attention_gain * attended
        return block.skip_gain * y + block.mlp_gain * reference_mlp(block, reference_norm(y, block.mlp_norm))
    return block.attention_gain * attended + block.mlp_gain * reference_mlp(block, normed)


def reference(made: Transformer, x: Tensor, weights: Tensor | None = None) -> Tensor:
    for block in made.blocks:
        own = [None] * len(x) if weights is None else list(weights)
        x = torch.stack([reference_block(block, row, w) for row, w in zip(x, own, strict=True)])
    return reference_norm(x, made.norm)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "dials",
    [
        {},
        {"causal": True},
        {"causal": True, "rotary": False},
        {"norm": "none", "depth": 2},
        {"activation": "swiglu", "hidden": 40},
        {"activation": "gelu", "heads": 1, "causal": True},
    ],
    ids=str,
)
def test_blocks_are_their_equations(block: str, dials: dict[str, Any]) -> None:
    made, x = model(block=block, **dials), draw(2, TOKENS, WIDTH)
    assert difference(made(x), reference(made, x)) < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("multiplied_out", [0, TOKENS])
def test_sets_with_weights_are_their_equations(
    block: str, padding: int, multiplied_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MULTIPLIED_OUT", multiplied_out)
    made, x, weights = model(block=block), draw(4, TOKENS, WIDTH), set_weights(4, padding)
    real = TOKENS - padding
    assert difference(made(x, weights)[:, :real], reference(made, x, weights)[:, :real]) < 1e-12


@pytest.mark.parametrize("block", SKIPLESS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_begins_as_the_identity(block: str, causal: bool) -> None:
    torch.manual_seed(0)
    made = Transformer(block=block, depth=2, width=WIDTH, heads=HEADS, causal=causal)
    for layer in made.blocks:
        x = draw(2, TOKENS, WIDTH).float()
        weights = None if causal else set_weights(2).float()
        assert difference(layer.attention(x, weights), x) < 1e-6


def test_queries_learn_from_the_first_step() -> None:
    """At the start the gradient of the keys is zero, for the queries are; that of the queries must not be."""
    made = model(block="sas", trained=False, causal=True)
    made(draw(2, TOKENS, WIDTH)).square().sum().backward()
    gradient = made.blocks[1].attention.project.weight.grad
    assert float(gradient[:WIDTH].abs().max()) > 0
    assert float(gradient[WIDTH:].abs().max()) == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_a_set_has_no_order(block: str) -> None:
    made, x, weights = model(block=block), draw(2, TOKENS, WIDTH), set_weights(2)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(made(x, weights)[:, order], made(x[:, order], weights[:, order]), atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_only_the_ratios_of_weights_count(block: str) -> None:
    made, x, weights = model(block=block), draw(2, TOKENS, WIDTH), set_weights(2)
    assert torch.allclose(made(x, weights), made(x, 3 * weights), atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_weight_of_two_is_two_tokens(block: str) -> None:
    made, x = model(block=block), draw(1, 3, WIDTH)
    twice = made(x, torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64))
    doubled = made(x[:, [0, 0, 1, 2]], torch.ones(1, 4, dtype=torch.float64))
    assert torch.allclose(twice, doubled[:, 1:], atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_padding_is_not_seen(block: str) -> None:
    made, x = model(block=block), draw(2, TOKENS, WIDTH)
    weights = set_weights(2, padding=2)
    other = x.clone()
    other[:, -2:] = 100.0
    assert torch.equal(made(x, weights)[:, :-2], made(other, weights)[:, :-2])
    assert torch.allclose(made(x, weights)[:, :-2], made(x[:, :-2], weights[:, :-2]), atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_comes_later_is_not_seen(block: str) -> None:
    made, x = model(block=block, causal=True), draw(2, TOKENS, WIDTH)
    other = x.clone()
    other[:, 4:] = draw(2, TOKENS - 4, WIDTH, seed=9)
    assert torch.equal(made(x)[:, :4], made(other)[:, :4])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cuts", [[1] * TOKENS, [TOKENS], [3, 1, 2, 1]])
@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(block: str, cuts: list[int]) -> None:
    made, x = model(block=block, causal=True), draw(2, TOKENS, WIDTH)
    cache = made.empty_cache(batch=2, room=TOKENS + 2)
    parts = [made(part, cache=cache) for part in x.split(cuts, dim=1)]
    assert cache.seen == TOKENS
    assert difference(torch.cat(parts, 1), made(x)) < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("causal", [True, False])
def test_compiled_blocks_compute_the_same(block: str, causal: bool) -> None:
    made, x = model(block=block, causal=causal, depth=2), draw(2, TOKENS, WIDTH)
    weights = None if causal else set_weights(2)
    results = []
    for call in (made, torch.compile(made, backend="aot_eager", fullgraph=True)):
        made.zero_grad()
        y = call(x, weights)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in made.parameters())])
    assert all(torch.allclose(mine, other, atol=1e-10) for mine, other in zip(*results, strict=True))


class Largest(TorchDispatchMode):
    """Remember the most numbers that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("causal", [True, False])
def test_no_matrix_of_tokens_by_tokens_is_built(block: str, causal: bool) -> None:
    made = Transformer(block=block, depth=1, width=8, heads=2, causal=causal)
    n = 1024
    x = torch.randn(1, n, 8)
    with Largest() as largest:
        made(x, None if causal else torch.ones(1, n)).sum().backward()
    assert largest.numel < n * n


@pytest.mark.parametrize(("block", "expected"), [("preln", 12), ("parallel", 12), ("sas", 10), ("sasp", 10)])
def test_matrices_of_a_block(block: str, expected: int) -> None:
    made = Transformer(block=block, depth=2, width=32, heads=4)
    assert sum(p.numel() for p in made.blocks[1].parameters() if p.ndim > 1) == expected * 32**2


def test_gains_norms_and_biases_do_not_decay() -> None:
    made = model(block="sas")
    decayed, kept = parameter_groups(made, 0.1)
    names = {id(p): name for name, p in made.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} == {"weight"}
    assert {names[id(p)].split(".")[-1] for p in kept["params"]} >= {"alpha", "beta", "gamma", "bias", "mlp_gain", "skip_gain"}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_the_mlp_s_gain_falls_with_depth() -> None:
    assert TransformerSettings(block="sasp", depth=18).first_mlp_gain == pytest.approx(0.1, abs=0.002)
    assert TransformerSettings(block="sasp", mlp_gain=0.05).first_mlp_gain == 0.05
    assert Transformer(block="sas", depth=4, width=8, heads=2).blocks[0].mlp_gain.item() == pytest.approx(0.21)


@pytest.mark.parametrize("block", BLOCKS)
def test_half_precision_stays_near(block: str) -> None:
    made, x = model(block=block, causal=True).float(), draw(2, 300, WIDTH).float()
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = made(x)
    assert difference(rounded.float(), exact) < 0.05 * float(exact.detach().abs().max())


@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_layers_take_the_place_of_all_linear_ones(block: str) -> None:
    made, x = model(block=block, width=32, heads=2, trained=False).float(), draw(2, TOKENS, 32).float()
    converted = copy.deepcopy(made)
    report = convert_to_fp8(converted)
    assert not report.kept
    assert len(report.converted) == sum(isinstance(layer, nn.Linear) for layer in made.modules())
    assert 0 < difference(converted(x), made(x)) < 0.05 * float(made(x).detach().abs().max())


@pytest.mark.parametrize("block", BLOCKS)
def test_a_sequence_is_learnt(block: str) -> None:
    """Copy the token before: attention must find one place, which an average cannot."""
    torch.manual_seed(0)
    made, embedding, head = (
        Transformer(block=block, depth=2, width=32, heads=4, causal=True),
        nn.Embedding(8, 32),
        nn.Linear(32, 8),
    )
    parameters = [p for part in (made, embedding, head) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(100):
        tokens = torch.randint(8, (32, 12))
        logits = head(made(embedding(tokens)))[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # chance is ln 8 = 2.08


def test_shaped_attention_works_by_itself() -> None:
    q, k, v = (draw(1, 2, 5, 4, seed=i) for i in range(3))
    ones = torch.ones(2, dtype=torch.float64)
    assert torch.allclose(shaped_attention(0 * q, k, v, Gains(ones, ones, ones), causal=True), v)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"block": "post"}, "block is 'post', expected one of preln, parallel, sas, sasp"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"width": 10, "heads": 3}, "width 10 does not split among 3 heads"),
        ({"width": 9, "heads": 3, "causal": True}, "heads of width 3 are odd"),
        ({"depth": 0}, "depth 0, width 256"),
        ({"hidden": 0}, "hidden 0 must all be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_settings_that_make_no_transformer_are_refused(dials: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Transformer(**dials)


def test_input_that_does_not_fit_is_refused() -> None:
    sets, sequences = model(), model(causal=True)
    x = draw(2, TOKENS, WIDTH)
    with pytest.raises(InvalidInput, match=r"expected \(batch, tokens, 24\)"):
        sets(x[..., :5])
    with pytest.raises(InvalidInput, match=r"weights have shape \(1, 7\), expected \(2, 7\)"):
        sets(x, set_weights(1))
    with pytest.raises(InvalidInput, match="a causal transformer takes no weights"):
        sequences(x, set_weights(2))
    with pytest.raises(InvalidInput, match="only a causal transformer"):
        sets.empty_cache(1, 4)
    with pytest.raises(InvalidInput, match="give settings, or depth by name"):
        Transformer(TransformerSettings(), depth=3)
    with torch.no_grad():
        cache = sequences.empty_cache(batch=2, room=8)
        sequences(x, cache=cache)
        with pytest.raises(InvalidInput, match="room for 8 tokens and holds 7; 7 more do not fit"):
            sequences(x, cache=cache)
        with pytest.raises(InvalidInput, match="the cache is for 2 sequences, these are 1"):
            sequences(x[:1, :1], cache=cache)
        with pytest.raises(InvalidInput, match="only a causal transformer"):
            sets(x, cache=cache)
    with pytest.raises(InvalidInput, match="room for at least one token"):
        sequences.empty_cache(0, 4)
