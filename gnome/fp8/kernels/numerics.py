"""The number rules of `gnome.fp8.formats` as Triton functions: the same bits from the same input.

Triton's casts to FP8 saturate, and keep NaN; nothing is clamped before them.
"""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
E4M3_SMALLEST = tl.constexpr(2.0**-9)
E5M2_MAX = tl.constexpr(57344.0)
FP16_MAX = tl.constexpr(65504.0)
BF16_MAX = tl.constexpr(3.3895313892515355e38)


@triton.jit
def power_of_two(exponent):
    """Return 2**exponent as FP32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse(scale):
    """Return 1 / scale of a power of two, by its bits."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scale_for(amax, top: tl.constexpr, previous, margin: tl.constexpr = 0):
    """Return the largest power of two s with amax * s * 2**margin <= top; `previous` where amax is 0 or not finite."""
    bits = amax.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top_bits = tl.full(amax.shape, top, tl.float32).to(tl.int32, bitcast=True)
    carry = tl.where((bits & 0x7FFFFF) <= (top_bits & 0x7FFFFF), 0, 1)
    exponent = (top_bits >> 23) - (bits >> 23) - carry - margin
    exponent = tl.where(exponent > 126, 126, tl.where(exponent < -126, -126, exponent))
    usable = (bits > 0) & (bits < 0x7F800000)
    return tl.where(usable, power_of_two(exponent), previous)


@triton.jit
def without_infinities(x):
    """Replace infinities by NaN, which a saturating cast keeps."""
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def stochastic_round(magnitude, random, mantissa_bits: tl.constexpr, smallest_normal: tl.constexpr):
    """Round positive FP32, not above the narrower format's largest, to its neighbours (see `formats.stochastic_cast`).

    `random`: int32 from 0 to 2**(23 - mantissa_bits) - 1.  With a `smallest_normal` of 0 subnormals are left to the cast.
    """
    if smallest_normal > 0:
        lift = tl.where(magnitude < smallest_normal, smallest_normal, 0.0)
        bits = (magnitude + lift).to(tl.int32, bitcast=True) + random
        return (bits & -(1 << (23 - mantissa_bits))).to(tl.float32, bitcast=True) - lift
    bits = magnitude.to(tl.int32, bitcast=True) + random
    return (bits & -(1 << (23 - mantissa_bits))).to(tl.float32, bitcast=True)


@triton.jit
def root_of(x, EXACT: tl.constexpr):
    """Return the square root: correctly rounded, or the hardware's in one instruction (relative error 1e-7, subnormals 0)."""
    if EXACT:
        return tl.sqrt_rn(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_of(x, EXACT: tl.constexpr):
    """Return 1 / x likewise."""
    if EXACT:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def with_sign_of(magnitude, x):
    """Return the magnitude with x's sign."""
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def mix(x):
    """Apply MurmurHash3's 32-bit finaliser to uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def random_words(block, place, seed, step):
    """Return 32 random bits (uint32) for places 0 to 127 in blocks (int64), a function of (seed, step, block, place) alone."""
    key = mix(step.to(tl.uint32) ^ mix(seed.to(tl.uint32)))
    row_key = mix(block.to(tl.uint32) ^ mix((block >> 32).to(tl.uint32) ^ key))
    return mix(row_key[:, None] + place.to(tl.uint32)[None, :] * 0x9E3779B9)
