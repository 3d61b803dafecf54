"""Device functions for counter-based normal numbers, word by word those of fastunlearn/host/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .images import to_float


@triton.jit
def philox_words(counter, sample, purpose, quads):
    """The four Philox4x32-10 words of each quad of elements of a sample: four uint32 blocks like `quads`.

    Quad q, of the int32 block `quads`, holds the elements `4 q .. 4 q + 3`. `counter` points to int64
    `(seed, step, first row)`; the counter words are (quad, first row + sample, step, purpose), the key is
    the seed.
    """
    seed = tl.load(counter)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = quads.to(tl.uint32), (tl.load(counter + 2) + sample).to(tl.uint32)
    c2, c3 = tl.load(counter + 1).to(tl.uint32), tl.full(quads.shape, purpose, tl.uint32)
    for _ in tl.static_range(10):
        # One wide multiplication gives both halves of a product; tl.philox spends one on each half.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normals(counter, sample, purpose, quads):
    """Standard normal float32 numbers of the elements of `quads`, in order: a block four times as long."""
    w0, w1, w2, w3 = philox_words(counter, sample, purpose, quads)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def load_noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK: tl.constexpr):
    """The elements `start .. start + BLOCK - 1` of the noise of a sample, float32.

    Read (`element` of `noise` `[B, D]`), or drawn where `noise` is None.
    """
    if noise is None:
        eps = normals(counter, sample, purpose, start // 4 + tl.arange(0, BLOCK // 4))
    else:
        eps = to_float(tl.load(noise + sample * D + element, mask=inside, other=0))
    return eps


@triton.jit
def _box_muller(radius_word, angle_word):
    """`sqrt(-2 log(v)) (cos(2 pi u), sin(2 pi u))`: v in (0, 1], u in [0, 1), the words' upper 24 bits.

    The angle is reduced to an eighth of a turn on integers, where nothing is lost, and needs two short
    polynomials (interpolated at Chebyshev nodes, error below 2^-24) in place of the general sine and cosine
    with their argument reduction.
    """
    unit = (radius_word >> 8).to(tl.int32).to(tl.float32) * 2**-24
    radius = tl.sqrt(-2.0 * tl.log(unit + 2**-24))

    turn = (angle_word >> 8).to(tl.int32)  # in 2^-24 turns
    quarter = (turn + (1 << 21)) >> 22  # the nearest quarter turn, 0 .. 4
    f = (turn - (quarter << 22)).to(tl.float32) * 2**-22  # what is left, in quarter turns: -1/2 .. 1/2
    z = f * f
    sine = f * (1.570796322 + z * (-0.6459634777 + z * (0.07968021765 + z * -0.004602149213)))
    cosine = 1.0 + z * (-1.233700541 + z * (0.2536692037 + z * (-0.0208600695 + z * 0.0009036280664)))

    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)  # quarters 1 and 2: the cosine is negative there
    y = tl.where((quarter & 2) != 0, -y, y)  # quarters 2 and 3: the sine is
    return radius * x, radius * y
