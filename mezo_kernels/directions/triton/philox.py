"""The random direction z as Triton device functions; `mezo_kernels.directions.philox` has its bits.

One text serves the compiler and the interpreter, but for three operations: the interpreter has no
inline PTX, and numpy no fma. Kernels that use these functions must be launched with
`enable_fp_fusion=False`, so that nothing is contracted but what `fma` says.
"""

import triton
import triton.language as tl

from mezo_kernels.directions import philox as reference

# True where `triton.jit` makes interpreted functions: both are decided when this file is imported.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

M0, M1 = tl.constexpr(reference.M0), tl.constexpr(reference.M1)
W0, W1 = tl.constexpr(reference.W0), tl.constexpr(reference.W1)
RADEMACHER = tl.constexpr(reference.DOMAINS["rademacher"])
SQRT_HALF_BITS = tl.constexpr(reference.SQRT_HALF_BITS)
BIG_WORD = tl.constexpr(reference.BIG_WORD)
TWO_M32, TWO_M33 = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
PIO2_HI, PIO2_LO = tl.constexpr(reference.PIO2_HI), tl.constexpr(reference.PIO2_LO)
S0, S1, S2 = (tl.constexpr(s) for s in reference.SIN_S)
C0, C1, C2, C3 = (tl.constexpr(c) for c in reference.COS_C)
# -2 log u instead of log u: a factor of a power of two changes no rounding, as nothing here gets
# near the smallest fp32 number.
LN2_HI_M2, LN2_LO_M2 = tl.constexpr(-2 * reference.LN2_HI), tl.constexpr(-2 * reference.LN2_LO)
P0, P1, P2, P3, P4, P5, P6, P7 = (tl.constexpr(-2 * p) for p in reference.LOG_P)


def device(function):
    """`triton.jit` for device functions, which kernels call.

    The interpreter prepares every call of a jitted function anew, which takes longer than the
    function's arithmetic; a plain function does as well there.
    """
    return function if INTERPRET else triton.jit(function)


def _fma_through_float64(a, b, c):
    """The fma of `mezo_kernels.directions.fp32`: a float64 sum, made odd by its exact error."""
    addend = tl.cast(c, tl.float64)
    product = tl.cast(a, tl.float64) * tl.cast(b, tl.float64)
    total = product + addend
    kept = total - product
    error = (product - (total - kept)) + (addend - kept)
    bits = total.to(tl.int64, bitcast=True)
    step = tl.where((error > 0) == (total > 0), 1, -1).to(tl.int64)
    is_even_inexact = (error != 0) & (tl.abs(total) < float("inf")) & ((bits & 1) == 0)
    return tl.where(is_even_inexact, bits + step, bits).to(tl.float64, bitcast=True).to(tl.float32)


# a * b + c, rounded once to fp32.
fma = _fma_through_float64 if INTERPRET else tl.fma


@device
def sqrt_of_radius(x):
    """The square root, rounded once to fp32, of x in [2**-33, 64).

    The PTX is what ptxas makes of `sqrt.rn.f32` for such x, without the branch for all others,
    which would cut the code into pieces that are not scheduled together.
    """
    if INTERPRET:
        return tl.sqrt_rn(x)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 y, root, half, rest;
            rsqrt.approx.ftz.f32 y, $1;
            mul.rn.ftz.f32 root, $1, y;
            mul.rn.ftz.f32 half, y, 0f3F000000;
            neg.f32 rest, root;
            fma.rn.f32 rest, rest, root, $1;
            fma.rn.f32 $0, rest, half, root;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@device
def philox(c0, uid, step, tail, key0, key1):
    """The four words of Philox4x32-10 of the counter (c0, uid, step, tail), all uint32."""
    a, b, c, d = c0, uid, step, tail
    for _ in tl.static_range(10):
        low0, high0 = _mul_wide(a, M0)
        low1, high1 = _mul_wide(c, M1)
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 += W0
        key1 += W1
    return a, b, c, d


@device
def _mul_wide(a, factor):
    """The low and the high word of a product; left to itself the compiler multiplies twice."""
    if INTERPRET:
        product = a.to(tl.uint64) * factor
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .u64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }",
            "=r,=r,r,r",
            [a, factor],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@device
def _radius(word):
    is_big = word >= BIG_WORD
    x = tl.where(is_big, word ^ 0xFFFFFFFF, word).to(tl.float32)
    v = fma(x, TWO_M32, TWO_M33)
    shifted = v.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    mantissa = ((shifted & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    e = tl.where(is_big, 0, shifted >> 23).to(tl.float32)
    f = tl.where(is_big, -v, mantissa - 1.0)
    f2 = f * f
    p = fma(f, P7, P6)
    p = fma(p, f, P5)
    p = fma(p, f, P4)
    p = fma(p, f, P3)
    p = fma(p, f, P2)
    p = fma(p, f, P1)
    p = fma(p, f, P0)
    y = f2 + fma(f2 * f, p, e * LN2_LO_M2)
    y = fma(f, -2.0, y)
    return sqrt_of_radius(fma(e, LN2_HI_M2, y))


@device
def _cos_sin(word):
    turned = word + 0x20000000
    t = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * TWO_M32
    t2 = t * t
    s = fma(fma(t2, S2, S1), t2, S0)
    s = fma(t, PIO2_HI, t * fma(t2, s, PIO2_LO))
    c = fma(fma(fma(t2, C3, C2), t2, C1), t2, C0)
    c = fma(t2, c, 1.0)
    is_swapped = (turned & 0x40000000) != 0
    cos, sin = tl.where(is_swapped, s, c), tl.where(is_swapped, c, s)
    return _negate_by_bit31(cos, turned + 0x40000000), _negate_by_bit31(sin, turned)


@device
def _negate_by_bit31(value, word):
    return (value.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@device
def box_muller(radius_word, angle_word):
    """Two normals of two words."""
    r = _radius(radius_word)
    cos, sin = _cos_sin(angle_word)
    return r * cos, r * sin


@device
def _sign(word, shift):
    """+1 or -1 by a bit of the word."""
    return (((word >> shift) << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@device
def _word_of(w0, w1, w2, w3, which):
    low, high = tl.where((which & 1) == 0, w0, w1), tl.where((which & 1) == 0, w2, w3)
    return tl.where((which & 2) == 0, low, high)


@device
def gaussian_of_groups(group, uid, step, tail, key0, key1, GROUPS: tl.constexpr):
    """z of `GROUPS` groups of four from each of `group` `[V]` on: `[V, 4 * GROUPS]`."""
    groups = group[:, None] + tl.arange(0, GROUPS)[None, :].to(tl.uint32)
    w0, w1, w2, w3 = philox(groups, uid, step, tail, key0, key1)
    # The last dimension of a join is the lowest bit of the element's number.
    even, odd = box_muller(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(even, odd).reshape(group.shape[0], 4 * GROUPS)


@device
def rademacher_of_groups(group, uid, step, tail, key0, key1, GROUPS: tl.constexpr):
    """As `gaussian_of_groups`; all elements lie in one word of signs."""
    w0, w1, w2, w3 = philox(group >> 5, uid, step, tail, key0, key1)
    word = _word_of(w0, w1, w2, w3, group >> 3)
    shift = (group & 7) * 4
    return _sign(word[:, None], shift[:, None] + tl.arange(0, 4 * GROUPS)[None, :])


@device
def gaussian_of_elements(element, uid, step, tail, key0, key1):
    """z of any elements (int64): one Philox call and half of its normals for each."""
    group = (element >> 2).to(tl.uint32)
    w0, w1, w2, w3 = philox(group, uid, step, tail, key0, key1)
    is_low = (element & 2) == 0
    even, odd = box_muller(tl.where(is_low, w0, w2), tl.where(is_low, w1, w3))
    return tl.where((element & 1) == 0, even, odd)


@device
def rademacher_of_elements(element, uid, step, tail, key0, key1):
    """z of any elements (int64)."""
    w0, w1, w2, w3 = philox((element >> 7).to(tl.uint32), uid, step, tail, key0, key1)
    word = _word_of(w0, w1, w2, w3, element >> 5)
    return _sign(word, (element & 31).to(tl.uint32))
