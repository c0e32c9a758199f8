"""The processes that `torchrun` starts for one run, each with a GPU of its own where there are GPUs."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from torch import distributed

from gnome.errors import InvalidInput

PATIENCE = timedelta(days=7)
"""How long processes wait for the slowest of them."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, the `local`-th of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Self:
        """Read what torchrun sets; one process alone where it did not start this one."""
        try:
            made = cls(
                *(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            )
        except ValueError as error:
            raise InvalidInput(f"RANK, WORLD_SIZE or LOCAL_RANK of the environment is no whole number ({error})") from None
        if not 0 <= made.rank < made.world or made.local < 0:
            raise InvalidInput(
                f"RANK {made.rank} of WORLD_SIZE {made.world}, LOCAL_RANK {made.local}: start the run with torchrun"
            )
        return made

    @property
    def device(self) -> torch.device:
        """The device to work on; processes beyond the GPUs of their machine share them."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local % torch.cuda.device_count())

    def share(self, n: int) -> list[int]:
        """Which of n pieces of work are this process's."""
        return list(range(self.rank, n, self.world))

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=PATIENCE)
            distributed.barrier()
