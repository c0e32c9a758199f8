"""Where networks run."""

import pytest
import torch

from flows.device import device_of
from flows.doctor import _device
from flows.settings import Settings
from gnome.errors import InvalidInput


@pytest.mark.parametrize(("asked", "there", "expected"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")])
def test_a_gpu_is_used_where_there_is_one(asked: str, there: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_of(Settings(device=asked)).type == expected  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="GNOME_DEVICE is cuda, but torch finds no GPU"):
        device_of(Settings(device="cuda"))
    (finding,) = _device(Settings(device="cuda"))
    assert not finding.ok
    assert "set it to cpu or auto" in finding.advice
