"""The formats that numbers are stored in, the rule that scales them, and the casts between.

A stored number is `payload = saturate(x * scale)` and reads back as `payload / scale`.  Scales are powers of two, so that scaling and its
inverse are exact, and a scale is the largest one that brings the largest magnitude (`amax`) to or below the format's largest number
(FP8-LM, arXiv 2310.18313, section 2; MS-AMP `ScalingMeta`).  It is worked out on the bits of amax: a logarithm rounds.

Every cast clamps first: casting above 448 to E4M3 gives NaN on torch 2.11 and saturates from 2.12 on.  Infinity cannot be told from a
large number after the clamp, so it is looked for in amax, before the cast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Consecutive numbers that share a scale where scales are kept by block."""

GEMM_MULTIPLE = 16
"""Matrix sides of an FP8 product on GPUs are multiples of this."""

STOCHASTIC_FROM = 8
"""Micro-batches after which their sum is rounded stochastically: to nearest it is truer, until a part is lost beside the sum."""

_FRACTION_BITS = 23
_FRACTION_MASK = (1 << _FRACTION_BITS) - 1
_MAX_EXPONENT = 126
"""Largest exponent of a scale; its inverse is then still a normal FP32 number."""


@dataclass(frozen=True)
class Format:
    """A floating-point format: `max` is the largest finite number, `min_exponent` that of the smallest normal one."""

    name: str
    dtype: torch.dtype
    max: float
    mantissa_bits: int
    min_exponent: int

    @property
    def smallest(self) -> float:
        """Smallest positive number, a subnormal."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0, 3, -6)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0, 2, -14)
FP16 = Format("fp16", torch.float16, 65504.0, 10, -14)
BF16 = Format("bf16", torch.bfloat16, torch.finfo(torch.bfloat16).max, 7, -126)

FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, FP16, BF16)}


def power_of_two_scale(amax: Tensor, fmt: Format, *, previous: Tensor | float = 1.0, margin: int = 0) -> Tensor:
    """Return the largest power of two s with amax * s * 2**margin <= fmt.max, elementwise, FP32.

    Where amax is zero or not finite there is nothing to go by and `previous` stays.  Golden values for E4M3: amax 10 gives 32, amax 1e4
    gives 1/32.
    """
    amax = amax.float().abs()
    bits = amax.view(torch.int32)
    exponent = (bits >> _FRACTION_BITS) - 127
    top = int(torch.tensor(fmt.max, device="cpu").view(torch.int32))
    fits = (bits & _FRACTION_MASK) <= (top & _FRACTION_MASK)
    chosen = (top >> _FRACTION_BITS) - 127 - exponent - (~fits).int() - margin
    chosen = chosen.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    scale = ((chosen + 127) << _FRACTION_BITS).view(torch.float32)
    usable = torch.isfinite(amax) & (amax > 0)
    return torch.where(usable, scale, previous)


def exponent_byte(scale: Tensor) -> Tensor:
    """Return the exponents of scales, which are powers of two, as uint8: all there is to a scale in a quarter of its bytes."""
    return (scale.view(torch.int32) >> _FRACTION_BITS).to(torch.uint8)


def scale_of_exponent(exponent: Tensor) -> Tensor:
    """Invert `exponent_byte`."""
    return (exponent.int() << _FRACTION_BITS).view(torch.float32)


def saturating_cast(x: Tensor, fmt: Format) -> Tensor:
    """Round to the nearest number of the format, ties to even; beyond its largest, the largest.  NaN stays NaN."""
    return x.clamp(-fmt.max, fmt.max).to(fmt.dtype)


def stochastic_cast(x: Tensor, fmt: Format, random_bits: Tensor, *, subnormals: bool = True) -> Tensor:
    """Round FP32 up or down with the probability that makes the mean exact.

    `random_bits`: int64 as x, evenly drawn from [0, 2**n) with n = 23 - mantissa bits; the same bits give the same result everywhere.
    They are added below the last bit kept, and what is below it is cut off.  Subnormal numbers of the format have the spacing of its
    smallest normal ones, so that one is added to them meanwhile; without `subnormals` these few are rounded to nearest.
    """
    magnitude = x.abs()
    lift = torch.where(magnitude < 2.0**fmt.min_exponent, 2.0**fmt.min_exponent, 0.0) if subnormals else torch.zeros_like(x)
    dropped = _FRACTION_BITS - fmt.mantissa_bits
    bits = (magnitude + lift).view(torch.int32) + random_bits.int()
    rounded = (bits & -(1 << dropped)).view(torch.float32) - lift
    return torch.copysign(rounded.clamp(max=fmt.max), x).to(fmt.dtype)


def exact_root(x: Tensor) -> Tensor:
    """Return the correctly rounded FP32 square root; torch's own on CPUs is not, and the same step gives the same bits everywhere."""
    return x.double().sqrt().float()


def random_words(index: Tensor, seed: int, step: Tensor | int) -> Tensor:
    """Return 32 random bits for every index (int64), a function of (seed, step, index) alone.

    A counter-based generator from MurmurHash3's finaliser, applied to seed, step, the block of 128 and the place in it in turn; the GPU
    kernels compute the same bits.
    """
    key = mix(torch.as_tensor(step, dtype=torch.int64, device=index.device) ^ mix(torch.as_tensor(seed, device=index.device)))
    block = index // BLOCK
    row_key = mix(block ^ mix((block >> 32) ^ key))
    return mix(row_key + (index % BLOCK) * 0x9E3779B9)


def mix(x: Tensor) -> Tensor:
    """Apply MurmurHash3's 32-bit finaliser (Appleby, public domain) in 64-bit integers."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)
