"""Tests of this folder need a CUDA device; `make gpu` runs them."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and let torch's own remarks about compiling and debugging pass."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
            for theirs in ("TensorFloat32", "Synchronization debug mode"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{theirs}"))
