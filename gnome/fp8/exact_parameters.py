"""The small parameters that stay as they are: biases, norms and other vectors, updated by torch's own fused AdamW."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnome.errors import InvalidCheckpoint


class ExactParameters:
    """Parameters with native gradients and moments of their own dtype; `members` pairs each with its parameter group."""

    def __init__(self, members: Sequence[tuple[nn.Parameter, int]]) -> None:
        self.members = list(members)
        self.first = [torch.zeros_like(p) for p, _ in members]
        self.second = [torch.zeros_like(p) for p, _ in members]
        self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p, _ in members]

    @property
    def nbytes(self) -> int:
        """Bytes of parameters, gradients and moments."""
        return sum(4 * p.nbytes for p, _ in self.members)

    def gradients(self) -> list[Tensor]:
        """Gradients that there are."""
        return [p.grad for p, _ in self.members if p.grad is not None]

    def gradient_norms(self) -> list[Tensor]:
        """Norms of the gradients that there are."""
        gradients = self.gradients()
        return list(torch._foreach_norm(gradients)) if gradients else []  # noqa: SLF001 - as torch's clip_grad_norm_ does

    def step(self, param_groups: Sequence[dict[str, Any]], control: Tensor) -> None:
        """Update; `control` (2,) says whether to skip and by what factor gradients are clipped."""
        for index, group in enumerate(param_groups):
            for dtype in {p.dtype for p, g in self.members if g == index}:
                own = [i for i, (p, g) in enumerate(self.members) if g == index and p.dtype == dtype and p.grad is not None]
                if not own:
                    continue
                steps = [self.steps[i] for i in own]
                gradients = [g for i in own if (g := self.members[i][0].grad) is not None]
                torch._foreach_add_(steps, [1 - control[0]] * len(steps))  # a single tensor would be read by the host
                torch._fused_adamw_(
                    [self.members[i][0] for i in own],
                    gradients,
                    [self.first[i] for i in own],
                    [self.second[i] for i in own],
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    grad_scale=1 / control[1],
                    found_inf=control[0],
                )

    def state(self) -> list[dict[str, Tensor]]:
        """Tensors of an exact resume, one dictionary a parameter."""
        return [
            {"first": m.clone(), "second": v.clone(), "steps": s.clone()}
            for m, v, s in zip(self.first, self.second, self.steps, strict=True)
        ]

    def load(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Restore what `state` returned; raises InvalidCheckpoint that names what is wrong."""
        for index, (m, v, s, state) in enumerate(zip(self.first, self.second, self.steps, states, strict=True)):
            for key, own in (("first", m), ("second", v), ("steps", s)):
                saved = state.get(key)
                if not isinstance(saved, Tensor) or saved.shape != own.shape or saved.dtype != own.dtype:
                    found = f"{saved.dtype} {tuple(saved.shape)}" if isinstance(saved, Tensor) else "missing"
                    raise InvalidCheckpoint(f"exact parameter {index}: {key} is {found}, expected {own.dtype} {tuple(own.shape)}")
            m.copy_(state["first"])
            v.copy_(state["second"])
            s.copy_(state["steps"])
