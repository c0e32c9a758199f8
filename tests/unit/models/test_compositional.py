"""The transformer over a formula's elements: its symmetries, its losses, and that it learns."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gnome.crystals.formula import parse_formula
from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.models.checkpoint import save_ensemble
from gnome.models.compositional import ANSWERS, CompositionalNetwork, CompositionalSettings, Pooling
from gnome.models.element_features import ELEMENT_FEATURES, valence_electrons
from gnome.models.energy_model import validate_formula_model
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.models.formulas import FormulaBatch, PackedFormulas
from gnome.models.recipes import EnsembleSettings, train_member
from gnome.models.training import Labelled, Run, TrainSettings, fit, fit_together, predict

SMALL = CompositionalSettings(depth=2, width=16, heads=2, dropout=0.0, n_schemes=2)
FORMULAS = ("Fe2O3", "LiFePO4", "NaCl", "Cu", "Ba(NO3)2", "Li7La3Zr2O12")


def network(seed: int = 0, settings: CompositionalSettings = SMALL) -> CompositionalNetwork:
    """A network whose every part counts: what begins at zero is moved away from it."""
    torch.manual_seed(seed)
    made = CompositionalNetwork(settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.double().eval()


def packed(*formulas: str) -> PackedFormulas:
    pack = PackedFormulas.from_compositions([parse_formula(formula) for formula in formulas])
    return replace(pack, fractions=pack.fractions.double())


def whole(pack: PackedFormulas) -> FormulaBatch:
    return pack.batch(torch.arange(len(pack)))


@pytest.mark.parametrize("block", ["sas", "sasp", "preln", "parallel"])
def test_a_formula_is_a_set_of_fractions(block: str) -> None:
    subject = network(settings=replace(SMALL, block=block))
    batch = whole(packed(*FORMULAS))
    answers = subject(batch)
    assert answers.shape == (len(FORMULAS), ANSWERS)
    turned = torch.randperm(batch.fractions.shape[1], generator=torch.Generator().manual_seed(1))
    others = {
        "order": replace(batch, atomic_numbers=batch.atomic_numbers[:, turned], fractions=batch.fractions[:, turned]),
        "padding": FormulaBatch(
            *(torch.nn.functional.pad(x, (0, 3)) for x in (batch.atomic_numbers, batch.fractions)), batch.scheme
        ),
    }
    for name, other in others.items():
        assert torch.allclose(subject(other), answers, rtol=0, atol=1e-10), name
    assert torch.allclose(subject(whole(packed("Fe4O6"))), answers[:1], rtol=0, atol=1e-6)  # fractions are FP32
    assert not torch.allclose(subject(whole(packed("Fe3O2"))), answers[:1], rtol=0, atol=1e-3)
    assert not torch.allclose(subject(replace(batch, scheme=batch.scheme + 1)), answers, rtol=0, atol=1e-3)


def test_batches_by_size_hold_every_formula_once_and_no_padding() -> None:
    pack = packed(*FORMULAS)
    batches = pack.by_size(2)
    assert sorted(row for rows, _ in batches for row in rows.tolist()) == list(range(len(FORMULAS)))
    subject = network()
    answers = subject(whole(pack))
    for rows, batch in batches:
        assert len(rows) <= 2
        assert (batch.fractions > 0).all()
        assert torch.allclose(subject(batch), answers[rows], rtol=0, atol=1e-10)


def test_packing_is_sorting_and_dividing() -> None:
    generator = np.random.default_rng(0)
    compositions = [
        {int(z): float(generator.integers(1, 9)) for z in generator.permutation(94)[:n] + 1} for n in generator.integers(1, 7, 50)
    ]
    pack = PackedFormulas.from_compositions(compositions, list(range(50)))
    for row, composition in enumerate(compositions):
        n = len(composition)
        assert pack.atomic_numbers[row].tolist() == sorted(composition) + [0] * (pack.fractions.shape[1] - n)
        shares = [composition[z] / sum(composition.values()) for z in sorted(composition)]
        np.testing.assert_allclose(pack.fractions[row, :n], shares, rtol=1e-6)
        assert not pack.fractions[row, n:].any()
    assert pack.scheme.tolist() == list(range(50))
    assert len(PackedFormulas.from_compositions([])) == 0
    wrongs: list[dict[int, float]] = [{}, {8: 0.0}, {8: float("nan")}]
    for wrong in wrongs:
        with pytest.raises(InvalidInput, match="composition"):
            PackedFormulas.from_compositions([{8: 1.0}, wrong])


def test_pooling_begins_as_the_weighted_mean() -> None:
    torch.manual_seed(0)
    pool = Pooling(8, 2).double()
    x, weights = torch.randn(3, 4, 8).double(), torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]]).double()
    expected = torch.einsum("bt,btd->bd", weights, pool.values(x))
    torch.testing.assert_close(pool(x, weights), expected, rtol=0, atol=1e-6)  # shares are FP32


def test_losses_against_their_formulas() -> None:
    settings = replace(SMALL, scales=(2.0, 0.5), scale_weight=0.3, stable_weight=0.7)
    subject = CompositionalNetwork(settings)
    answers = torch.tensor([[-1.0, 0.2, math.log(1.5), math.log(0.4), 0.8], [0.5, 0.1, 0.0, 0.0, -1.0]], requires_grad=True)
    targets = torch.tensor([[-1.5, -0.1], [1.0, float("nan")]])
    loss, error = subject.objective(answers, targets)

    def likelihood(error: float, scale: float, unit: float) -> float:
        return math.sqrt(2) * error / scale + math.log(scale / unit)

    first = 0.5 / 2 + 0.3 / 0.5 + 0.3 * (likelihood(0.5, 1.5, 2.0) + likelihood(0.3, 0.4, 0.5)) + 0.7 * math.log1p(math.exp(-0.8))
    second = 0.5 / 2 + 0.3 * likelihood(0.5, 1.0, 2.0)
    assert loss.tolist() == pytest.approx([first, second], rel=1e-5)
    assert error.tolist() == pytest.approx([0.4, 0.5])
    loss.sum().backward()
    assert answers.grad is not None
    assert answers.grad[:, 0].tolist() == pytest.approx([0.5, -0.5])  # the scale does not move the energy
    assert answers.grad[1, [1, 3, 4]].tolist() == [0, 0, 0]  # not known: not learnt from


def test_jitter_keeps_sums_and_what_is_not_there() -> None:
    batch = whole(packed(*FORMULAS))
    jittered = batch.jittered(0.1 * torch.randn(batch.fractions.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(jittered.fractions.sum(1), torch.ones(len(FORMULAS)).double())
    assert torch.equal(jittered.fractions > 0, batch.fractions > 0)
    assert (jittered.fractions - batch.fractions).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("z", "expected"),
    [(1, [1, 0, 0, 0]), (8, [2, 4, 0, 0]), (18, [2, 6, 0, 0]), (26, [2, 0, 6, 0]), (60, [2, 0, 0, 4]), (82, [2, 2, 10, 14])],
)
def test_valence_electrons(z: int, expected: list[int]) -> None:
    assert valence_electrons(z) == expected


def test_features_tell_all_elements_apart() -> None:
    assert np.isfinite(ELEMENT_FEATURES).all()
    assert len(np.unique(ELEMENT_FEATURES, axis=0)) == len(ELEMENT_FEATURES)


def learnable(n: int = 200) -> Labelled:
    """Energies that are bilinear in the fractions, one in four decomposition energies unknown."""
    rng = np.random.default_rng(0)
    compositions = []
    for _ in range(n):
        elements, amounts = rng.choice([3, 8, 11, 17, 26], 2, replace=False), rng.integers(1, 6, 2)
        compositions.append(dict(zip(elements.tolist(), amounts.tolist(), strict=True)))
    pack = PackedFormulas.from_compositions(compositions)
    share = [{z: amount / sum(c.values()) for z, amount in c.items()} for c in compositions]
    e_form = torch.tensor([-sum(x * z for z, x in c.items()) / 10 for c in share])
    decomposition = torch.tensor([0.1 * (max(c.values()) - 0.6) for c in share])
    decomposition[::4] = float("nan")
    return Labelled(pack, torch.stack([e_form, decomposition], 1))


@pytest.mark.parametrize(("precision", "min_features"), [("fp32", 0), ("fp8", 0), ("fp8", 1024)])
def test_training_learns_both_energies(precision: str, min_features: int) -> None:
    examples = learnable()
    torch.manual_seed(0)
    subject = CompositionalNetwork(replace(SMALL, scales=(0.5, 0.02)))
    settings = TrainSettings(
        epochs=12, batch_size=20, learning_rate=3e-3, warm_up=0.1,
        ema_decay=0.0 if precision == "fp8" and min_features == 0 else 0.9,
        fraction_jitter=0.01, precision=precision, fp8_min_features=min_features,
    )  # fmt: skip
    before = predict(subject, examples.inputs)
    fit(subject, examples, examples, settings)
    after = predict(subject, examples.inputs)
    for column in range(2):
        known = ~examples.targets[:, column].isnan()
        errors = [(answers[:, column] - examples.targets[:, column]).abs()[known].mean() for answers in (before, after)]
        assert errors[1] < 0.35 * errors[0], column


def test_a_run_with_averaged_weights_resumes_to_the_bit(tmp_path: Path) -> None:
    examples = learnable(60)
    settings = TrainSettings(epochs=4, batch_size=20, warm_up=0.2, ema_decay=0.8, fraction_jitter=0.02, save_every=2)

    class Killed(Exception):
        """Stops the run."""

    def stop(record: object) -> None:
        if getattr(record, "epoch", 0) == 3:
            raise Killed

    kept = []
    for broken in (False, True):
        torch.manual_seed(0)
        subject = CompositionalNetwork(replace(SMALL, dropout=0.2))
        path = tmp_path / f"{broken}.pt"
        if broken:
            with pytest.raises(Killed):
                fit(subject, examples, examples, settings, state_path=path, on_epoch=stop)
            torch.manual_seed(0)
            subject = CompositionalNetwork(replace(SMALL, dropout=0.2))
        fit(subject, examples, examples, settings, state_path=path)
        kept.append(subject.state_dict())
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_averaged_weights_are_what_is_kept() -> None:
    examples = learnable(40)

    def trained(epochs: int, decay: float) -> torch.Tensor:
        torch.manual_seed(0)
        subject = CompositionalNetwork(SMALL)
        settings = TrainSettings(epochs=epochs, batch_size=40, learning_rate=1e-2, ema_decay=decay)
        fit(subject, examples, replace(examples, targets=examples.targets * float("nan")), settings)
        return subject.answer.weight.detach()

    torch.manual_seed(0)
    before = CompositionalNetwork(SMALL).answer.weight.detach()
    after = trained(1, 0.0)
    torch.testing.assert_close(trained(1, 0.95), before + 0.9 * (after - before))  # the first step's decay is 1/10
    torch.testing.assert_close(trained(1, 0.05), before + 0.95 * (after - before))


def test_runs_trained_together_are_those_trained_alone() -> None:
    examples, settings = learnable(50), TrainSettings(batch_size=20, warm_up=0.2, ema_decay=0.8, fraction_jitter=0.02)

    def runs() -> list[Run]:
        made = []
        for seed, epochs in ((1, 3), (2, 2)):
            torch.manual_seed(seed)
            network = CompositionalNetwork(replace(SMALL, dropout=0.2))
            made.append(
                Run(network=network, train=examples, validation=examples, settings=replace(settings, seed=seed, epochs=epochs))
            )
        return made

    heard: list[tuple[int, int]] = []
    together, alone = runs(), runs()
    histories = fit_together(together, on_epoch=lambda index, record: heard.append((index, record.epoch)))
    assert sorted(heard) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    for one, other, history in zip(together, alone, histories, strict=True):
        assert fit(other.network, other.train, other.validation, other.settings) == history
        own, expected = one.network.state_dict(), other.network.state_dict()
        assert all(torch.equal(own[name], expected[name]) for name in own)


@pytest.mark.parametrize("change", [{"ema_decay": 1.0}, {"warm_up": -0.1}])
def test_settings_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        TrainSettings(**change)  # type: ignore[arg-type]


def test_weights_of_fp8_layers_are_not_averaged() -> None:
    examples, settings = learnable(40), TrainSettings(epochs=1, ema_decay=0.9, precision="fp8", fp8_min_features=0)
    with pytest.raises(InvalidInput, match="set ema_decay to 0"):
        fit(CompositionalNetwork(SMALL), examples, examples, settings)


def test_an_ensemble_keeps_its_contract_and_answers_all(tmp_path: Path) -> None:
    examples = learnable(40)
    settings = EnsembleSettings(network=SMALL, train=TrainSettings(epochs=1, batch_size=20), members=3)
    members = [train_member(i, settings, examples, examples) for i in range(3)]
    path = tmp_path / "formulas.safetensors"
    schemes = [{"method": "test"}, {"method": "older", "decomposition_energy": True}]
    save_ensemble(path, members, {"method": "test", "elements": [3, 8, 11, 17, 26], "schemes": schemes})
    ensemble = CompositionalEnsemble.load(path)
    compositions = [{3: 1, 8: 2}, {26: 2, 8: 3}, {11: 1, 17: 1}, {3: 1, 26: 1, 8: 2}]
    validate_formula_model(ensemble, compositions)
    answers = ensemble.answers(compositions)
    assert answers.method == "older"
    batch = whole(PackedFormulas.from_compositions(compositions, [1] * len(compositions)))
    with torch.inference_mode():
        expected = torch.stack([member(batch) for member in ensemble.members]).median(0).values  # type: ignore[operator]
    np.testing.assert_allclose(answers.e_form_per_atom, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(answers.decomposition_energy, expected[:, 1], atol=1e-5)
    assert np.abs(answers.e_form_per_atom - np.median(ensemble.member_energies(compositions), axis=0)).max() > 0
    assert ((answers.p_stable > 0) & (answers.p_stable < 1)).all()
    assert np.isfinite(answers.decomposition_energy).all()
    assert (answers.spread >= 0).all()
    assert np.isnan(answers.e_form_uncertainty).all(), "not known before it was calibrated"
    other = ensemble.answers(compositions, scheme=ensemble.scheme_of("test"))
    np.testing.assert_allclose(other.e_form_per_atom, np.median(ensemble.member_energies(compositions), axis=0))
    assert np.isnan(other.decomposition_energy).all()
    assert np.isnan(other.p_stable).all()
    with pytest.raises(InvalidInput, match="learnt test, older"):
        ensemble.scheme_of("pbe")
    wrongs: list[object] = [[{}], schemes[:1], [*schemes, {"method": "third"}], 3, [{"method": 5}] * 2]
    for wrong in wrongs:
        save_ensemble(path, members, {"method": "test", "elements": [3], "schemes": wrong})
        with pytest.raises(InvalidCheckpoint, match="schemes must name a method each, 2 in all"):
            CompositionalEnsemble.load(path)


@pytest.mark.parametrize("scales", [(1.0, 0.0), (1.0,), (float("nan"), 1.0)])
def test_scales_that_cannot_be(scales: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="scales"):
        CompositionalSettings(scales=scales)


def test_a_run_is_not_taken_up_on_other_formulas(tmp_path: Path) -> None:
    examples, path = learnable(40), tmp_path / "run.pt"
    settings = TrainSettings(epochs=1, batch_size=20)
    torch.manual_seed(0)
    subject = CompositionalNetwork(SMALL)
    again = CompositionalNetwork(SMALL)
    again.load_state_dict(subject.state_dict())
    fit(subject, examples, examples, settings, state_path=path)
    pack = examples.inputs.batch(torch.arange(40))
    numbers = pack.atomic_numbers.clone()
    numbers[-1, 0] += 1
    other = Labelled(PackedFormulas(numbers, pack.fractions, pack.scheme), examples.targets)
    with pytest.raises(InvalidCheckpoint, match="other settings or data"):
        fit(again, examples, other, settings, state_path=path)


def test_a_run_is_not_taken_up_under_another_loss(tmp_path: Path) -> None:
    examples, path = learnable(40), tmp_path / "run.pt"
    for weight in (0.2, 0.5):
        torch.manual_seed(0)
        subject = CompositionalNetwork(replace(SMALL, stable_weight=weight))
        if weight == 0.2:
            fit(subject, examples, examples, TrainSettings(epochs=1, batch_size=20), state_path=path)
        else:
            with pytest.raises(InvalidCheckpoint, match="other settings"):
                fit(subject, examples, examples, TrainSettings(epochs=1, batch_size=20), state_path=path)
