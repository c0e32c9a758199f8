"""What an interrupted training is taken up from: a file that names the run by all that decides it."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from gnome.atomic_write import atomic_write
from gnome.errors import InvalidCheckpoint
from gnome.models.memory import is_out_of_memory

_CHUNK = 4096


def digest_of_settings(network: nn.Module, settings: Mapping[str, Any], device: torch.device) -> "hashlib._Hash":
    """Begin the name of a run: its settings, initial weights, and the kind of device; the optimizer's state is another on a GPU."""
    own: dict[str, Any] = getattr(network, "config", dict)()  # with what leaves no trace in the weights, like dropout
    digest = hashlib.sha256(json.dumps([dict(settings), own, device.type], sort_keys=True).encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest


def add_examples(digest: "hashlib._Hash", inputs: Any, targets: Tensor) -> None:
    """Add examples to the name of a run: packed inputs with `batch` and a length, and their targets."""
    digest.update(targets.cpu().numpy().tobytes())
    for rows in torch.arange(len(inputs), device=targets.device).split(_CHUNK):
        batch = inputs.batch(rows)
        for field in fields(batch):
            digest.update(getattr(batch, field.name).cpu().numpy().tobytes())


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's state; the file appears whole or not at all."""
    blob = io.BytesIO()  # a full disk must be an OSError, which torch's own writer does not raise
    torch.save(dict(state), blob)
    with atomic_write(path) as temporary:
        temporary.write_bytes(blob.getbuffer())


@contextmanager
def read_state(path: Path, device: torch.device, key: str) -> Iterator[dict[str, Any]]:
    """Give a saved state to whoever takes it up.

    Raises InvalidCheckpoint when the file is damaged, was saved by another run than `key` names, or does not fit within the context.
    """
    try:
        _check_bytes(path)
        state = torch.load(path, map_location=device, weights_only=True)
        if state["run"] != key:
            raise InvalidCheckpoint(f"{path} was saved by a run with other settings or data; delete it to start anew")
        yield state
    except UnpicklingError as error:  # torch's message advises to read it unsafely
        raise InvalidCheckpoint(f"{path} cannot be resumed (it holds what no state does); delete it to start anew") from error
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        if is_out_of_memory(error):  # there is nothing wrong with the state
            raise
        reason = str(error).split("\n", 1)[0][:200]
        raise InvalidCheckpoint(f"{path} cannot be resumed ({reason}); delete it to start anew") from error


def _check_bytes(path: Path) -> None:
    """Compare the file with its own checksums, which torch does not."""
    with ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise InvalidCheckpoint(f"{path} is damaged ({damaged} is not as it was written); delete it to start anew")
