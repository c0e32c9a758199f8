"""The scale and shift that turn a network's numbers into eV/atom, checked where settings are made and where a card is read."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gnome.errors import InvalidInput

_LARGEST = 1e6


def check_label_scale(scales: Sequence[float], shifts: Sequence[float]) -> None:
    """Raise InvalidInput unless all scales are above 0 and no number is beyond what FP32 holds with room to spare."""
    if not all(0 < scale <= _LARGEST for scale in scales) or not all(math.fabs(shift) <= _LARGEST for shift in shifts):
        raise InvalidInput(
            f"scales {scales} and shifts {shifts}: expected numbers of at most {_LARGEST:g} eV/atom, the scales above 0"
        )


def require_label_scale(settings: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raise InvalidInput where a card's settings leave out a scale or shift that the network has: no default can stand for them."""
    missing = [name for name in ("scale", "shift", "scales", "shifts") if name in fields and name not in settings]
    if missing:
        raise InvalidInput(f"{', '.join(missing)} must be named")


MOST_CUTOFF = 20.0
"""Angstrom; no network of ours reaches as far, and graphs grow with the third power."""


def check_shape(*, cutoff: float, **sizes: int) -> None:
    """Refuse a network that nothing can be predicted with."""
    if not 0 < cutoff <= MOST_CUTOFF:
        raise InvalidInput(f"cutoff is {cutoff}, expected more than 0 and at most {MOST_CUTOFF:g} angstrom")
    for name, size in sizes.items():
        if size < 1:
            raise InvalidInput(f"{name} is {size}, expected 1 or more")
