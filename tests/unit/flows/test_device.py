"""Where networks run."""

import pickle
from typing import Any

import pytest
import torch

import dft_stub.chgnet_calculator
from dft_stub.chgnet import WORKERS_ON_GPU
from dft_stub.potentials import CHGNetPotential
from flows.device import device_of
from flows.doctor import _device
from flows.settings import Settings
from flows.workspace import evaluator_of
from gnome.errors import EvaluatorUnavailable, InvalidInput


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


@pytest.mark.parametrize(("asked", "there", "expected"), [("cpu", True, "cpu"), ("auto", False, "cpu"), ("cuda", True, "cuda")])
def test_the_default_evaluator_works_where_networks_do(
    asked: str, there: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    evaluator: Any = evaluator_of(Settings(device=asked, workers=32), "chgnet")  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(evaluator.potential)).device == expected
    assert evaluator.method.label == evaluator_of(Settings(device="cpu"), "chgnet").method.label
    pool = evaluator._pool
    assert pool._n_workers == (32 if expected == "cpu" else WORKERS_ON_GPU)
    assert pool._limits.bounds_addresses == (expected == "cpu")
    assert pool._limits.memory_bytes >= 2**30


def test_the_device_reaches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Loaded:
        @staticmethod
        def load(**options: Any) -> str:
            asked["load"] = options["use_device"]
            return "network"

    def calculator(**options: Any) -> dict[str, Any]:
        asked["calculator"] = options["use_device"]
        return options

    monkeypatch.setattr(dft_stub.chgnet_calculator, "CHGNet", Loaded)
    monkeypatch.setattr(dft_stub.chgnet_calculator, "_QuietCalculator", calculator)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    CHGNetPotential("cuda").calculator()
    assert asked == {"load": "cuda", "calculator": "cuda"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EvaluatorUnavailable, match="torch finds no GPU for device cuda; set GNOME_DEVICE to cpu"):
        CHGNetPotential("cuda").calculator()


def test_a_gpu_that_is_not_there_is_said_before_the_default_evaluator_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="GNOME_DEVICE is cuda, but torch finds no GPU"):
        evaluator_of(Settings(device="cuda"), "chgnet")
