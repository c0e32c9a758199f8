"""Shaped attention on a GPU: the kernels against the sums in FP64, called as they are and within compiled code."""

import copy

import pytest
import torch

from gnome.transformer.attention import Gains, shaped_attention
from gnome.transformer.block import Block
from gnome.transformer.rotary import angles
from gnome.transformer.settings import TransformerSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("n_tokens", [1, 100, 128, 1000])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_shaped_attention_is_that_of_fp64(width: int, n_tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(n_tokens)
    exact = [torch.randn(3, 2, n_tokens, width, generator=generator, device="cuda", dtype=torch.float64) for _ in range(4)]
    exact = [x.bfloat16().double() for x in exact]
    gains = [1 + 0.3 * torch.randn(2, generator=generator, device="cuda", dtype=torch.float64) for _ in range(3)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        queries, keys, values = (x.to(dtype).detach().requires_grad_() for x in exact[:3])
        own = [gain.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_() for gain in gains]
        shaped = shaped_attention(queries, keys, values, Gains(*own), causal=True)
        found.append([shaped, *torch.autograd.grad(shaped, [queries, keys, values, *own], exact[3].to(dtype))])
    for mine, right in zip(*found, strict=True):
        assert float((mine.double() - right).norm()) < 0.015 * float(right.norm()) + 1e-3


@pytest.mark.parametrize("block", ["sas", "sasp"])
def test_compiled_blocks_are_the_blocks(block: str) -> None:
    torch.manual_seed(0)
    settings = TransformerSettings(block=block, causal=True, depth=2, width=128, heads=2)  # type: ignore[arg-type]
    plain = Block(settings, first=False).cuda()
    compiled = copy.deepcopy(plain)
    compiled.compile(dynamic=False)
    x = torch.randn(4, 96, 128, device="cuda").bfloat16()
    turn = angles(torch.arange(96, device="cuda"), 64)
    for one in (plain, compiled):
        with torch.autocast("cuda", torch.bfloat16):
            one(x, turn=turn).float().square().sum().backward()
    for (name, mine), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm()) < 0.02 * float(theirs.grad.norm()) + 1e-6, name
