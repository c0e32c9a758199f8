"""CHGNet's calculator from the weights in its own package, checked before they are opened."""

import contextlib
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import chgnet
import torch
from ase.calculators.calculator import Calculator
from chgnet.model.dynamics import CHGNetCalculator
from chgnet.model.model import CHGNet

from gnome.errors import EvaluatorUnavailable


def load_calculator(chgnet_version: str, file_name: str, sha256: str, device: str = "cpu") -> Calculator:
    """Load CHGNet on a device; raises EvaluatorUnavailable unless that is there and the weights are the known file."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise EvaluatorUnavailable(f"chgnet: torch finds no GPU for device {device}; set GNOME_DEVICE to cpu")
    check_sha256(Path(chgnet.__file__).parent / "pretrained" / chgnet_version / file_name, sha256)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # both print a line about the device
        model = CHGNet.load(model_name=chgnet_version, use_device=device, verbose=False)
        return _QuietCalculator(model=model, use_device=device, on_isolated_atoms="error")


class _QuietCalculator(CHGNetCalculator):
    """CHGNet's calculator without torch's remark on how CHGNet 0.4.2 takes the volumes."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        """Calculate as CHGNet does."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad", UserWarning)
            super().calculate(*args, **kwargs)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a weights file that is missing or altered."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EvaluatorUnavailable(f"weights {path} cannot be read ({error}); reinstall chgnet") from None
    if digest != expected:
        raise EvaluatorUnavailable(
            f"weights {path} have sha256 {digest[:12]}..., expected {expected[:12]}...; not loaded, reinstall chgnet 0.4.2"
        )
