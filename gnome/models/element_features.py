"""What is known of every element before any training: its place in the periodic table, electrons, electronegativity and radius.

Ground-state configurations follow Madelung's rule; its exceptions (Cr, Cu, ...) differ by an electron between two subshells, which a
network learns from its embeddings.
"""

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.elements import COVALENT_RADIUS, ELECTRONEGATIVITY, MAX_ATOMIC_NUMBER

_NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)
_CAPACITY = (2, 6, 10, 14)
"""Electrons that an s, p, d and f subshell holds."""
_ORDER = sorted(((n, kind) for n in range(1, 8) for kind in range(min(n, 4))), key=lambda shell: (shell[0] + shell[1], shell[0]))


def valence_electrons(atomic_number: int) -> list[int]:
    """Count s, p, d and f electrons beyond the last noble gas, by Madelung's rule."""
    core = max(z for z in _NOBLE if z < atomic_number)
    found, filled = [0, 0, 0, 0], 0
    for _, kind in _ORDER:
        count = min(_CAPACITY[kind], atomic_number - filled)
        if filled >= core:
            found[kind] += count
        filled += count
    return found


def _features(atomic_number: int) -> list[float]:
    period = next(i for i, z in enumerate(_NOBLE) if z >= atomic_number)
    valence = valence_electrons(atomic_number)
    holds = [_CAPACITY[kind] if count else 0 for kind, count in enumerate(valence)]
    outermost = max(kind for kind, count in enumerate(valence) if count)
    electronegativity = ELECTRONEGATIVITY[atomic_number]
    known = electronegativity < float("inf")
    return [
        atomic_number / 100,
        period / 7,
        *(count / 10 for count in valence),
        *((hole - count) / 10 for hole, count in zip(holds, valence, strict=True)),
        sum(valence[:3]) / 10,
        *(float(outermost == kind) for kind in range(4)),
        electronegativity - 1.8 if known else 0.0,
        float(known),
        COVALENT_RADIUS[atomic_number] - 1.5,
        *(float(period == i) for i in range(1, 8)),
    ]


ELEMENT_FEATURES: NDArray[np.float32] = np.array(
    [np.zeros(len(_features(1))), *(_features(z) for z in range(1, MAX_ATOMIC_NUMBER + 1))], dtype=np.float32
)
"""(atomic number, feature); row 0 is padding."""

COVALENT_RADII: NDArray[np.float32] = np.array(
    [1.0, *(COVALENT_RADIUS[z] for z in range(1, MAX_ATOMIC_NUMBER + 1))], dtype=np.float32
)
"""By atomic number, angstrom; row 0 is padding."""
