"""Where networks predict and learn in rounds: what `GNOME_DEVICE` says."""

import torch

from flows.settings import Settings
from gnome.errors import InvalidInput


def device_of(settings: Settings) -> torch.device:
    """Return the device that ensembles predict and learn on; raises InvalidInput for a GPU that is not there."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            "GNOME_DEVICE is cuda, but torch finds no GPU; set it to cpu or auto, or install a torch that finds it"
        )
    return torch.device(settings.device)
