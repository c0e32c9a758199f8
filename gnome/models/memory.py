"""Memory that torch has not: how it is told from other errors, and what is said of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gnome.errors import OutOfMemory


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch ran out of memory, of a GPU or of the machine, which it tells by the message alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_named(advice: str) -> Iterator[None]:
    """Raise OutOfMemory with advice where torch has none left."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"memory does not suffice: {advice}") from error
