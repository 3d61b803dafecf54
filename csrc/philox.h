// Counter-based standard normal numbers: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, with the words of
// fastunlearn/host/philox.py. A number depends on (seed, step, row of the global batch, purpose, element of
// the image) alone, so any range of elements can be made anywhere and in any order.
#pragma once

#include <cstdint>

#include "numeric.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace fastunlearn::FASTUNLEARN_ISA {
namespace philox {

// Lanes of 64 bits, of which the lower 32 hold a word: hardware multiplies those to 64 bits and ignores the
// upper half. (Left to itself, GCC 12 multiplies 64 by 64 bits: half the speed.)
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
FASTUNLEARN_INLINE Lanes product(Lanes a, uint32_t b) {
  return (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a,
                                       _mm512_set1_epi64(b));  // unmasked, GCC 12 warns of itself
}
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
FASTUNLEARN_INLINE Lanes product(Lanes a, uint32_t b) {
  return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
#elif defined(__SSE2__)
typedef uint64_t Lanes __attribute__((vector_size(16)));
FASTUNLEARN_INLINE Lanes product(Lanes a, uint32_t b) {
  return (Lanes)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
}
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
FASTUNLEARN_INLINE Lanes product(Lanes a, uint32_t b) { return (a & 0xFFFFFFFFu) * b; }
#endif

constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
constexpr int kQuads = 64;  // counters made at a time: a multiple of 2 * kLanes

struct Stream {
  uint64_t seed;
  uint32_t row, step, purpose;
};

struct Words {
  Lanes w0, w1, w2, w3;
};

struct Pair {
  float cosine, sine;
};

/// The ten rounds for the counters (quad, row, step, purpose). The upper halves of the lanes hold nothing of
/// use.
FASTUNLEARN_INLINE Words rounds(const Stream& stream, Lanes quad) {
  const Lanes zero = {};
  Words c = {quad, zero + stream.row, zero + stream.step, zero + stream.purpose};
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes product0 = product(c.w0, 0xD2511F53u), product1 = product(c.w2, 0xCD9E8D57u);
    c = {(product1 >> 32) ^ c.w1 ^ k0, product1, (product0 >> 32) ^ c.w3 ^ k1, product0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// words[j][i] = word j of counter `quad + i`, for `quads` counters (at most kQuads) rounded up to whole
/// lanes.
FASTUNLEARN_INLINE void make_words(const Stream& stream, int64_t quad, int64_t quads,
                                   uint32_t (*words)[kQuads]) {
  Lanes even;
  for (int lane = 0; lane < kLanes; ++lane) even[lane] = static_cast<uint64_t>(quad + 2 * lane);
  for (int64_t i = 0; i < quads; i += 2 * kLanes, even += 2 * kLanes) {
    const Words a = rounds(stream, even), b = rounds(stream, even + 1);
    const Lanes interleaved[4] = {(a.w0 & 0xFFFFFFFFu) | (b.w0 << 32), (a.w1 & 0xFFFFFFFFu) | (b.w1 << 32),
                                  (a.w2 & 0xFFFFFFFFu) | (b.w2 << 32), (a.w3 & 0xFFFFFFFFu) | (b.w3 << 32)};
    for (int j = 0; j < 4; ++j) __builtin_memcpy(words[j] + i, &interleaved[j], sizeof(Lanes));
  }
}

/// `sqrt(-2 log((n + 1) 2^-24))` for the 24-bit integer n in the top of `word`, to a few float32 roundings.
///
/// `(n + 1) 2^-24 = (1 + f) 2^e`, 1 + f in [sqrt(1/2), sqrt(2)): e = 0 where the logarithm is near 0: nothing
/// cancels.
FASTUNLEARN_INLINE float radius(uint32_t word) {
  constexpr uint32_t sqrt_half = 0x3F3504F3u;                                  // its bits
  constexpr float two_ln2_high = 0x1.62e4p+0f, two_ln2_low = 0x1.7f7d1cp-19f;  // e * two_ln2_high is exact
  const float n_plus_1 = static_cast<float>(static_cast<int32_t>(word >> 8) + 1);  // at most 2^24: exact
  const uint32_t bits = same_bits<uint32_t>(n_plus_1);
  const int32_t exponent = static_cast<int32_t>(bits - sqrt_half) >> 23;
  const float f = same_bits<float>(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent - 24);
  float p =
      -0.1740087286f;  // -2 (log(1 + f) - f + f^2 / 2) / f^3, minimax: the logarithm's relative error is 3e-8
  p = p * f + 0.2853497319f;
  p = p * f - 0.2982953520f;
  p = p * f + 0.3315516947f;
  p = p * f - 0.3992612767f;
  p = p * f + 0.5000267407f;
  p = p * f - 0.6666782147f;
  const float curved = (p * f + 1.0f) * (f * f) - two_ln2_low * e;
  return __builtin_sqrtf((curved - 2.0f * f) - two_ln2_high * e);
}

/// Cosine and sine of `2 pi n / 2^24` for the 24-bit integer n in the top of `word`, to a few float32
/// roundings.
///
/// n is split into a quadrant and y in [-1, 1), exactly: the angle within the quadrant is y pi / 4.
FASTUNLEARN_INLINE Pair cosine_and_sine(uint32_t word) {
  const uint32_t n = word >> 8;
  const uint32_t quadrant = (n + (1u << 21)) >> 22;
  const float y = static_cast<float>(static_cast<int32_t>(n - (quadrant << 22))) * 0x1p-21f;
  const float z = y * y;
  float c = 3.53133465582e-6f;  // minimax: error 5e-11
  c = c * z - 3.25942007951e-4f;
  c = c * z + 1.58543277519e-2f;
  c = c * z - 3.08425135838e-1f;
  c = c * z + 1.0f;
  float s = -3.59545078153e-5f;  // minimax: relative error 3e-9
  s = s * z + 2.49000712715e-3f;
  s = s * z - 8.07454348302e-2f;
  s = s * z + 7.85398160983e-1f;
  s = s * y;
  const bool odd = quadrant & 1;
  const uint32_t cosine = same_bits<uint32_t>(odd ? s : c) ^ (((quadrant + 1) & 2) << 30);
  const uint32_t sine = same_bits<uint32_t>(odd ? c : s) ^ ((quadrant & 2) << 30);
  return {same_bits<float>(cosine), same_bits<float>(sine)};
}

/// Four normal numbers from the words of every counter; like the words, for `quads` rounded up to whole
/// lanes, so that no number is made by another instruction (and rounded otherwise) because it is among the
/// last of a row.
FASTUNLEARN_INLINE void box_muller(const uint32_t (*words)[kQuads], int64_t quads, float* __restrict__ out) {
  constexpr int32_t step = 2 * kLanes;
  const int32_t whole = (static_cast<int32_t>(quads) + step - 1) / step * step;
#pragma omp simd
  for (int32_t i = 0; i < whole; ++i) {
    const float radius0 = radius(words[0][i]), radius1 = radius(words[2][i]);
    const Pair angle0 = cosine_and_sine(words[1][i]), angle1 = cosine_and_sine(words[3][i]);
    out[4 * i + 0] = radius0 * angle0.cosine;
    out[4 * i + 1] = radius0 * angle0.sine;
    out[4 * i + 2] = radius1 * angle1.cosine;
    out[4 * i + 3] = radius1 * angle1.sine;
  }
}

}  // namespace philox

/// Standard normal numbers of the elements [start, start + count) of row `row` of the global batch.
///
/// `start` must be a multiple of 4 (four elements share a counter); `out` holds `count` floats. A `count`
/// that is a multiple of 256 costs least.
static inline void normals(uint64_t seed, uint32_t row, uint32_t step, uint32_t purpose, int64_t start,
                           int64_t count, float* out) {
  using philox::kQuads;
  const philox::Stream stream = {seed, row, step, purpose};
  alignas(64) uint32_t words[4][kQuads];
  for (; count >= 4 * kQuads; start += 4 * kQuads, count -= 4 * kQuads, out += 4 * kQuads) {
    philox::make_words(stream, start / 4, kQuads, words);
    philox::box_muller(words, kQuads, out);
  }
  if (count > 0) {
    alignas(64) float rest[4 * kQuads];
    const int64_t quads = (count + 3) / 4;
    philox::make_words(stream, start / 4, quads, words);
    philox::box_muller(words, quads, rest);
    __builtin_memcpy(out, rest, static_cast<uint64_t>(count) * sizeof(float));
  }
}

}  // namespace fastunlearn::FASTUNLEARN_ISA
