"""The factor that keeps a sum of E4M3 gradients over many ranks from saturating (FP8-LM, arXiv 2310.18313, equations 3 to 6).

Gradients are multiplied by mu before they are rounded and added in E4M3.  Where more than 0.001 % of a tensor's sum sits at +-448, mu is
halved; otherwise it grows so as to double in 1000 steps.  The constants are those of the only public implementation (MS-AMP, pull request
140); the released MS-AMP keeps mu at its first value.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gnome.errors import InvalidCheckpoint
from gnome.fp8.scaled_tensor import check_scale

SATURATED_SHARE = 1e-5
GROWTH = 2.0 ** (1 / 1000)


class AutomaticScale:
    """One mu for each tensor, FP32 on the device; the same rule on the same sums keeps it equal on all ranks."""

    def __init__(self, n_tensors: int, ranks: int, device: torch.device | str) -> None:
        self.mu = torch.full((n_tensors,), first_mu(ranks), device=device)

    def update(self, saturated: Tensor, numels: Tensor, squares: Tensor) -> None:
        """Move mu by what a reduction gave, without waiting for the device.

        For each tensor: `saturated` counts the numbers at +-448 in the sum, `squares` is the mean's sum of squares.  A tensor without a
        gradient, with only zeros or with NaN or infinity says nothing about saturation, and its mu stays.
        """
        told = torch.isfinite(squares) & (squares > 0)
        full = saturated.double() > SATURATED_SHARE * numels.double()
        moved = torch.where(full, self.mu / 2, self.mu * GROWTH)
        self.mu.copy_(torch.where(told, moved, self.mu))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what restores mu to the bit."""
        return {"mu": self.mu.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore mu; raises InvalidCheckpoint if it is missing, of another shape, or not positive."""
        if "mu" not in state:
            raise InvalidCheckpoint("automatic scale: the state holds no mu")
        check_scale(state["mu"], self.mu.shape, "automatic scale", power_of_two=False)
        self.mu.copy_(state["mu"])


def first_mu(ranks: int) -> float:
    """Return the factor that mu starts from, and that MS-AMP keeps: 1 / sqrt(ranks)."""
    return 1 / math.sqrt(ranks)
