"""A transformer over the elements of a formula: formation and decomposition energy, each with its uncertainty, and whether it is stable.

A formula is a set of elements weighted by their fractions.  The fractions enter three times: as features of the tokens, as a prior of
attention (an element twice as frequent is seen twice as much), and as the weights of the pooling (Goodall & Lee, Roost, Nat. Commun. 11,
6280 (2020), pools so).  Tokens have no places, so the order of elements means nothing, and fractions make Fe2O3 and Fe4O6 the same.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.errors import InvalidInput
from gnome.models.element_features import ELEMENT_FEATURES
from gnome.models.formulas import FormulaBatch
from gnome.models.label_scale import check_label_scale
from gnome.models.linear import at_least_fp32, make_linear
from gnome.quantities import Quantity
from gnome.transformer.block import RMSNorm
from gnome.transformer.settings import Activation, BlockName
from gnome.transformer.stack import Transformer

TARGETS = (Quantity.E_FORM_PER_ATOM, Quantity.DECOMPOSITION_ENERGY)
"""The columns of the labels, NaN where one is not known, and the first columns of the answers; eV/atom."""

ANSWERS = 2 * len(TARGETS) + 1
"""Columns of an answer: the energies, the logarithms of their standard deviations, the logit of stable."""

_FREQUENCIES = 8
_MAX_LOG_SCALE = 4.0


@dataclass(frozen=True, kw_only=True)
class CompositionalSettings:
    """Shape of the network.

    `scales` and `shifts` (eV/atom) are those of the two targets; `n_schemes` label schemes (sets of corrections) may be learnt together,
    and a prediction is asked for under one.  `target_weights` are those of the losses of the energies, which are counted in their scales;
    `scale_weight` and `stable_weight` those of the losses of the uncertainties and of stable-or-not.
    """

    block: BlockName = "sas"
    depth: int = 4
    width: int = 256
    heads: int = 8
    hidden: int | None = None
    activation: Activation = "relu"
    dropout: float = 0.1
    head_layers: int = 2
    n_schemes: int = 1
    scales: tuple[float, ...] = (1.0, 0.1)
    shifts: tuple[float, ...] = (-1.5, 0.0)
    target_weights: tuple[float, ...] = (1.0, 1.0)
    scale_weight: float = 0.1
    stable_weight: float = 0.2

    def __post_init__(self) -> None:
        n = len(TARGETS)
        if len(self.target_weights) != n or not all(0 <= x < math.inf for x in self.target_weights):
            raise InvalidInput(f"target_weights {self.target_weights}: expected {n}, none below 0")
        if len(self.scales) != n or len(self.shifts) != n:
            raise InvalidInput(f"scales {self.scales} and shifts {self.shifts}: expected {n} of each")
        check_label_scale(self.scales, self.shifts)


class FractionEncoding(nn.Module):
    """Fractions (B, T) to features (B, T, width): waves of the fraction and of its logarithm, which tells 0.01 from 0.02."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(_FREQUENCIES).float() / 2, persistent=False)
        self.project = make_linear(4 * _FREQUENCIES + 2, width)

    def forward(self, fractions: Tensor) -> Tensor:
        """Encode; 0 is taken for 1e-4."""
        log = fractions.clamp(min=1e-4).log()
        waves = [x[..., None] * self.frequencies for x in (fractions, log / 10)]
        features = [f(x) for x in waves for f in (torch.sin, torch.cos)]
        return self.project(torch.cat([*features, fractions[..., None], log[..., None] / 4], -1))


class Pooling(nn.Module):
    """A mean over tokens for each head, weighted by fractions times what the head finds important; the plain mean to begin with."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.importance = make_linear(width, heads)
        self.values = make_linear(width, width)
        nn.init.zeros_(self.importance.weight)
        nn.init.zeros_(self.importance.bias)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Pool (B, T, width) with weights (B, T), 0 for padding, to (B, width)."""
        share = (self.importance(x).float() + weights.log()[..., None]).softmax(1)
        values = self.values(x).unflatten(-1, (self.heads, -1))
        return torch.einsum("bth,bthd->bhd", share.to(values.dtype), values).flatten(1)


class ResidualLayer(nn.Module):
    """x + MLP(norm(x))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.up, self.down = make_linear(width, 2 * width), make_linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (B, width)."""
        return x + self.down(self.dropout(functional.silu(self.up(self.norm(x)))))


class CompositionalNetwork(nn.Module):
    """Answers (B, ANSWERS) for a `FormulaBatch`: energies, the logarithms of their deviations (eV/atom), the logit of stable."""

    kind = "compositional-transformer"
    fixed_shapes = True
    features: Tensor
    scales: Tensor
    shifts: Tensor
    target_weights: Tensor

    def __init__(self, settings: CompositionalSettings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        self.register_buffer("features", torch.from_numpy(ELEMENT_FEATURES), persistent=False)
        self.embed = nn.Embedding(len(ELEMENT_FEATURES), width)
        self.embed_features = make_linear(ELEMENT_FEATURES.shape[1], width)
        self.embed_scheme = nn.Embedding(settings.n_schemes, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.zeros_(self.embed_scheme.weight)
        self.encode = FractionEncoding(width)
        self.transformer = Transformer(
            block=settings.block, depth=settings.depth, width=width, heads=settings.heads, hidden=settings.hidden,
            activation=settings.activation, dropout=settings.dropout,
        )  # fmt: skip
        self.pool = Pooling(width, settings.heads)
        self.layers = nn.Sequential(
            *(ResidualLayer(width, settings.dropout) for _ in range(settings.head_layers)), RMSNorm(width)
        )
        self.answer = make_linear(width, ANSWERS)
        nn.init.normal_(self.answer.weight, std=0.02)
        nn.init.zeros_(self.answer.bias)
        self.register_buffer("scales", torch.tensor(settings.scales), persistent=False)
        self.register_buffer("target_weights", torch.tensor(settings.target_weights), persistent=False)
        self.register_buffer("shifts", torch.tensor(settings.shifts), persistent=False)

    def forward(self, batch: FormulaBatch) -> Tensor:
        """Answer for formulas with at least one element each."""
        numbers, fractions = batch.atomic_numbers, batch.fractions
        x = self.embed(numbers) + self.embed_features(self.features[numbers]) + self.encode(fractions)
        x = self.transformer(x + self.embed_scheme(batch.scheme)[:, None], fractions)
        answer = at_least_fp32(self.answer(self.layers(self.pool(x, fractions))))
        n = len(TARGETS)
        energies = answer[:, :n] * self.scales + self.shifts
        log_scales = _MAX_LOG_SCALE * torch.tanh(answer[:, n : 2 * n] / _MAX_LOG_SCALE) + self.scales.log()
        return torch.cat([energies, log_scales, answer[:, 2 * n :]], 1)

    def objective(self, answers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the mean absolute error of the known targets (B, 2), of each formula (B,).

        The loss of an energy is its absolute error in units of the target's scale.  That of its uncertainty is the negative log likelihood
        of a Laplace distribution of that standard deviation, which does not move the energy: where both are learnt from the likelihood,
        as in Roost, what is hard to predict soon counts little.  Stable or not, known where the decomposition energy is, has the cross
        entropy.
        """
        n = len(TARGETS)
        known = ~targets.isnan()
        targets = torch.where(known, targets, answers[:, :n].detach())
        errors = (answers[:, :n] - targets).abs()
        log_scales = answers[:, n : 2 * n]
        likelihood = math.sqrt(2) * errors.detach() * torch.exp(-log_scales) + log_scales - self.scales.log()
        stable = functional.binary_cross_entropy_with_logits(
            answers[:, -1], (targets[:, 1] <= 0).to(answers.dtype), reduction="none"
        )
        settings = self.settings
        loss = ((self.target_weights * errors / self.scales + settings.scale_weight * likelihood) * known).sum(1)
        loss = loss + settings.stable_weight * stable * known[:, 1]
        return loss, (errors.detach() * known).sum(1) / known.sum(1).clamp(min=1)

    def config(self) -> dict[str, Any]:
        """Settings as a checkpoint's card keeps them."""
        return asdict(self.settings)
