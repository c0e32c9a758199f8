"""Ensembles on disk: weights as safetensors, everything else in a JSON card beside them.

`NAME.safetensors` holds every member's tensors under `MEMBER.tensor name`, in FP16; `NAME.json` is the card: kind, settings, data,
licences, method of the labels, split, metrics, and the sha256 of the weights.  A file whose hash is not the card's is never loaded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gnome.atomic_write import atomic_write
from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.errors import InvalidCheckpoint, InvalidInput
from gnome.models.angular_network import AngularNetwork, AngularSettings
from gnome.models.compositional import CompositionalNetwork, CompositionalSettings
from gnome.models.formula_graph import FormulaGraphNetwork, FormulaGraphSettings
from gnome.models.label_scale import require_label_scale
from gnome.models.structural import StructuralNetwork, StructuralSettings

CARD_VERSION = 1
Network = StructuralNetwork | AngularNetwork | CompositionalNetwork | FormulaGraphNetwork

_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    network.kind: (network, settings)
    for network, settings in (
        (StructuralNetwork, StructuralSettings),
        (AngularNetwork, AngularSettings),
        (CompositionalNetwork, CompositionalSettings),
        (FormulaGraphNetwork, FormulaGraphSettings),
    )
}


def make_network(kind: str, settings: Mapping[str, Any]) -> Network:
    """Build an untrained network of a kind.

    Raises InvalidCheckpoint for an unknown kind or settings it does not take.
    """
    if kind not in _KINDS:
        raise InvalidCheckpoint(f"unknown kind of network {kind!r}; expected one of {', '.join(_KINDS)}")
    network, own_settings = _KINDS[kind]
    try:
        require_label_scale(settings, {field.name for field in fields(own_settings)})
        made: Network = network(own_settings(**settings))
    except (TypeError, OverflowError, InvalidInput) as error:
        raise InvalidCheckpoint(f"settings do not fit a {kind} network: {error}") from None
    return made


def save_ensemble(path: Path, members: Sequence[Network], card: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights (`path`, .safetensors) and card (.json); returns the card as written.

    `{sha256}` in the file's name stands for the first 16 digits of the weights' hash.  Weights go first and under a temporary name, so a
    kill leaves either the old pair, or weights whose hash the old card does not name.
    """
    tensors = {
        f"{i}.{name}": tensor.detach().to("cpu", torch.float16).contiguous()
        for i, member in enumerate(members)
        for name, tensor in member.state_dict().items()
    }
    blob = save(tensors)
    full_card = {
        **card,
        "card_version": CARD_VERSION,
        "kind": members[0].kind,
        "settings": members[0].config(),
        "n_members": len(members),
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    path = path.with_name(path.name.replace("{sha256}", full_card["sha256"][:16]))
    with atomic_write(path) as temporary:
        temporary.write_bytes(blob)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(full_card, indent=2) + "\n")
    return full_card


def load_ensemble(path: Path) -> tuple[list[Network], dict[str, Any]]:
    """Read members and card.

    Raises InvalidCheckpoint when a file is missing, truncated, altered, or does not describe a network of this version.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read ({error.strerror})") from None
    card = read_card(path)
    if hashlib.sha256(blob).hexdigest() != card.get("sha256"):
        raise InvalidCheckpoint(
            f"{path}: the weights are not those its card describes (truncated or altered); get the file again"
        )
    try:
        tensors = load(blob)
    except SafetensorError as error:
        raise InvalidCheckpoint(f"{path}: not a safetensors file ({error})") from None
    n_members = card["n_members"]
    if not isinstance(n_members, int) or n_members < 1:
        raise InvalidCheckpoint(f"{path.with_suffix('.json')}: n_members is {n_members!r}, expected 1 or more")
    if (found := len({name.split(".", 1)[0] for name in tensors})) != n_members:
        raise InvalidCheckpoint(f"{path}: holds {found} members, its card says {n_members}")
    members = []
    for i in range(n_members):
        try:
            network = make_network(card["kind"], card["settings"])
        except (InvalidCheckpoint, RuntimeError, ValueError, TypeError) as error:
            raise InvalidCheckpoint(f"{path.with_suffix('.json')}: {str(error).splitlines()[0]}") from None
        prefix = f"{i}."
        weights = {name[len(prefix) :]: tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise InvalidCheckpoint(f"{path}: member {i} does not fit its settings ({str(error).splitlines()[0]})") from None
        network.eval()
        members.append(network)
    return members, card


def read_card(path: Path) -> dict[str, Any]:
    """Read the card beside the weights; raises InvalidCheckpoint when it is missing, no JSON, or of another version."""
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidCheckpoint(f"{card_path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, numbers or nesting beyond all measure
        raise InvalidCheckpoint(f"{card_path}: not a card ({error})") from None
    missing = {"kind", "settings", "n_members", "sha256", "method", "elements"} - set(card if isinstance(card, dict) else {})
    if missing:
        raise InvalidCheckpoint(f"{card_path}: not a card, it lacks {', '.join(sorted(missing))}")
    elements = card["elements"]
    if not isinstance(elements, list) or not all(type(z) is int and 1 <= z <= MAX_ATOMIC_NUMBER for z in elements):
        raise InvalidCheckpoint(f"{card_path}: elements is {str(elements)[:60]!r}, expected atomic numbers")
    if not isinstance(card["method"], str) or not card["method"].strip():
        raise InvalidCheckpoint(f"{card_path}: method is {str(card['method'])[:60]!r}, expected its label")
    if card.get("card_version") != CARD_VERSION:
        raise InvalidCheckpoint(f"{card_path}: card version {card.get('card_version')!r}, this program reads {CARD_VERSION}")
    return dict(card)
