"""Steps as CUDA graphs: the same numbers as without, and networks trained together are those trained alone."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import nn

from gnome.crystals.crystal import Crystal
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.captured_step import CapturedStep
from gnome.models.compositional import CompositionalNetwork, CompositionalSettings
from gnome.models.formulas import PackedFormulas
from gnome.models.linear import Precision
from gnome.models.structural import StructuralNetwork, StructuralSettings
from gnome.models.training import Labelled, Run, TrainSettings, fit, fit_together, predict

pytestmark = pytest.mark.gpu

SETTINGS = TrainSettings(epochs=4, batch_size=32, warm_up=0.2, ema_decay=0.8, fraction_jitter=0.02, weight_decay=1e-2)


def examples(n: int = 300) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    amounts = torch.randint(1, 6, (n, 3), generator=generator).tolist()
    elements = [torch.randperm(80, generator=generator)[:3].add(1).tolist() for _ in range(n)]
    pack = PackedFormulas.from_compositions([dict(zip(*pair, strict=True)) for pair in zip(elements, amounts, strict=True)])
    targets = torch.randn((n, 2), generator=generator)
    targets[::3, 1] = torch.nan
    return Labelled(pack.to("cuda"), targets.to("cuda"))


def run(seed: int, *, captured: bool = True, precision: str = "fp32", dropout: float = 0.2) -> Run:
    torch.manual_seed(seed)
    network = CompositionalNetwork(CompositionalSettings(depth=2, width=64, heads=4, dropout=dropout)).to("cuda")
    network.fixed_shapes = captured
    labelled = examples()
    settings = replace(SETTINGS, seed=seed, precision=precision)  # type: ignore[arg-type]
    return Run(network=network, train=labelled, validation=labelled, settings=settings)


def distance(one: Run, other: Run) -> float:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_are_the_steps(precision: str) -> None:
    one, other, third = (run(1, captured=captured, precision=precision) for captured in (True, False, False))
    for subject in (one, other):
        fit(subject.network, subject.train, subject.validation, subject.settings)
    moved = distance(other, third)
    assert moved > 1e-3
    assert distance(one, other) < 0.01 * moved


def test_runs_trained_together_are_those_trained_alone() -> None:
    """Without dropout, whose masks depend before torch 2.13 on how the runs interleave."""
    together, alone = ([run(seed, dropout=0.0) for seed in range(4)] for _ in range(2))
    histories = fit_together(together)
    for one, other, history in zip(together, alone, histories, strict=True):
        expected = fit(other.network, other.train, other.validation, other.settings)
        assert [record.validation_mae for record in history] == pytest.approx([r.validation_mae for r in expected], rel=1e-3)
        assert distance(one, other) < 0.05 * distance(one, run(one.settings.seed, dropout=0.0))


def crystal_run(kind: str, seed: int, precision: Precision, *, captured: bool = True) -> Run:
    rng = np.random.default_rng(0)
    crystals = [
        Crystal(np.eye(3) * rng.uniform(3.5, 4.5), rng.integers(1, 80, n), rng.uniform(0, 1, (n, 3)))
        for n in rng.integers(1, 6, 200)
    ]
    torch.manual_seed(seed)
    network: nn.Module = (
        AngularNetwork(AngularSettings(width=64, steps=2, cutoff=4.0, channels=4))
        if kind == "angular"
        else StructuralNetwork(StructuralSettings(width=64, cutoff=4.0))
    )
    network.fixed_shapes = captured
    targets = torch.from_numpy(rng.normal(size=200)).float()
    labelled = Labelled(PackedGraphs.from_crystals(crystals, 4.0).to("cuda"), targets.to("cuda"))
    settings = TrainSettings(epochs=3, batch_size=32, ema_decay=0.8, volume_jitter=0.1, precision=precision, seed=seed)
    return Run(network=network.to("cuda"), train=labelled, validation=labelled, settings=settings)


@pytest.fixture(autouse=True)
def _order_of_sums() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("kind", "precision"), [*product(["gnome", "angular"], ["fp32", "bf16"]), ("angular", "fp8")])
def test_captured_steps_of_crystals_are_the_steps(kind: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the noise of sums in changing order, which two runs without capture show.

    In FP32 these take batches as they come; in fewer bits padded ones too, since other shapes take other kernels, which round
    otherwise, and every sum has its order: Adam makes whole steps of gradients that are nothing but rounding.
    """
    padded = precision != "fp32"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(padded, warn_only=True)
    captured, plain, again, untouched = (crystal_run(kind, 1, precision, captured=flag) for flag in (True, padded, padded, False))
    fit(captured.network, captured.train, captured.validation, captured.settings)
    monkeypatch.setattr("gnome.models.training.CapturedStep", lambda step: step)
    for subject in (plain, again):
        fit(subject.network, subject.train, subject.validation, subject.settings)
    noise, moved = distance(plain, again), distance(plain, untouched)
    assert moved > 1e-3
    assert distance(captured, plain) < max(4 * noise, 0.02 * moved) < moved


def test_captured_steps_draw_new_jitter_each_time_and_the_same_in_a_repeated_run() -> None:
    """Targets are what the network answers where nothing is moved, and its weights stand still: errors are what was drawn alone."""
    histories = []
    for _ in range(2):
        subject = crystal_run("angular", 1, "fp32")
        settings = replace(
            subject.settings,
            epochs=4,
            learning_rate=1e-30,
            volume_jitter=0.0,
            position_jitter=0.3,
            strain_jitter=0.1,
            ema_decay=0.0,
        )
        answered = replace(subject.train, targets=predict(subject.network, subject.train.inputs))
        histories.append([record.train_mae for record in fit(subject.network, answered, answered, settings)])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    assert max(histories[0]) > 1.01 * min(histories[0])


def test_a_captured_step_draws_what_the_seed_before_it_says() -> None:
    seeds = [1, 2, 3, 4, 5, 6, 5, 7]  # the first three are not captured
    noise = CapturedStep(lambda x: x + torch.randn_like(x))
    zeros, drawn = torch.zeros(100, device="cuda"), []
    with torch.cuda.stream(torch.cuda.Stream()):
        for seed in seeds:
            torch.manual_seed(seed)
            drawn.append(noise(zeros).clone())
    torch.cuda.synchronize()
    same = [(i, j) for i, j in combinations(range(len(seeds)), 2) if torch.equal(drawn[i], drawn[j])]
    assert same == [(4, 6)]
    assert all(float(one.abs().mean()) > 0.5 for one in drawn)
