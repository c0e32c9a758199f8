"""Independent streams of random numbers from one seed and a place: a round, a member, an epoch."""

import numpy as np


def derived_seed(seed: int, *place: int) -> int:
    """Derive a seed (0 to 2^32 - 1) for one place, so that seeds and places that lie side by side share no stream."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])
