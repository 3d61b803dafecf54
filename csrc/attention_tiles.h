// What attention and its gradient are made of: small products with one operand broadcast, and e^x.
//
// A vector holds one number for each of kLanes queries (forward) or keys (backward), so that the softmax
// needs no sums across lanes. A "column" operand lies [depth][stride], a "row" operand [count][depth]; depth
// is a multiple of 8.
#pragma once

#include <type_traits>

#include "numeric.h"

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kDepthBlock = 8, kRowBlock = 8;  // 8 x 2 sums in 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kDepthBlock = 4, kRowBlock = 4;  // 4 x 2 sums in 16 registers
#else
constexpr int kLanes = 4, kDepthBlock = 4, kRowBlock = 4;
#endif

constexpr int64_t kTerms = 32;  // of one sum in float32; longer ones are sums of such sums, which err less

template <int kCount>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * kCount)));
  typedef uint32_t bits __attribute__((vector_size(4 * kCount)));
};
using Vector = Lanes<kLanes>::type;

template <class V = Vector>
FASTUNLEARN_INLINE V load(const float* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V>
FASTUNLEARN_INLINE void store(float* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

FASTUNLEARN_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

/// e^x for x < 88, relative error 2^-23 + |x| 2^-26 (|x| 2^-24 without fused multiply-add); 0 below -69, so
/// that products are not subnormal; NaN stays.
FASTUNLEARN_INLINE Vector exp(Vector x) {
  constexpr float log2e = 0x1.715476p+0f, magic = 0x1.8p23f + 127;
  const Vector shifted = x * log2e + magic;  // its last places hold round(x log2 e) + 127
  const Vector rest = x * log2e - (shifted - magic);
  const Vector power = reinterpret_cast<Vector>(reinterpret_cast<Lanes<kLanes>::bits>(shifted) << 23);
  Vector sum = 0x1.3b2d4cp-7f + rest * (0x1.5f3e54p-10f + rest * 0x1.41fbbcp-13f);  // 2^rest, |rest| <= 1/2
  sum = 0x1.c6aee8p-5f + rest * sum;
  sum = 0x1.ebfbdcp-3f + rest * sum;
  sum = 0x1.62e43p-1f + rest * sum;
  sum = 1.0f + rest * sum;
  return x < -69.0f ? Vector{} : sum * power;
}

/// Calls `run(vectors, start)` for pairs of vectors and perhaps a last single one, until they hold `count`
/// numbers.
template <class Run>
FASTUNLEARN_INLINE void in_pairs(int64_t count, Run run) {
  int64_t start = 0;
  for (; start + kLanes < count; start += 2 * kLanes) run(std::integral_constant<int, 2>{}, start);
  if (start < count) run(std::integral_constant<int, 1>{}, start);
}

/// sums[r][c] = <row r, columns of vector c>.
template <int kRows, int kVectors>
FASTUNLEARN_INLINE void products(const float* rows, const float* columns, int64_t stride, int64_t depth,
                                 Vector (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) sums[r][c] = Vector{};
  for (int64_t first = 0; first < depth; first += kTerms) {
    Vector part[kRows][kVectors] = {};
    const int64_t last = first + kTerms < depth ? first + kTerms : depth;
#pragma GCC unroll 8
    for (int64_t d = first; d < last; ++d) {
      Vector column[kVectors];
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) column[c] = load(columns + d * stride + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < kVectors; ++c) part[r][c] += rows[r * depth + d] * column[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) sums[r][c] = first == 0 ? part[r][c] : sums[r][c] + part[r][c];
  }
}

/// out[d] += sum over i of rows[i][d] weights[i], for all d; weights and out are vectors, a stride apart.
template <int kVectors>
FASTUNLEARN_INLINE void accumulate(const float* rows, int64_t count, int64_t depth, const float* weights,
                                   int64_t weight_stride, float* out, int64_t stride) {
  for (int64_t begin = 0; begin < count; begin += kTerms) {
    const int64_t end = begin + kTerms < count ? begin + kTerms : count;
    for (int64_t first = 0; first < depth; first += kDepthBlock) {
      Vector sums[kDepthBlock][kVectors] = {};
      for (int64_t i = begin; i < end; ++i) {
        Vector weight[kVectors];
#pragma GCC unroll 2
        for (int c = 0; c < kVectors; ++c) weight[c] = load(weights + i * weight_stride + c * kLanes);
#pragma GCC unroll 8
        for (int d = 0; d < kDepthBlock; ++d)
#pragma GCC unroll 2
          for (int c = 0; c < kVectors; ++c) sums[d][c] += rows[i * depth + first + d] * weight[c];
      }
#pragma GCC unroll 8
      for (int d = 0; d < kDepthBlock; ++d)
#pragma GCC unroll 2
        for (int c = 0; c < kVectors; ++c) {
          float* place = out + (first + d) * stride + c * kLanes;
          store(place, load(place) + sums[d][c]);
        }
    }
  }
}

/// out[d] *= factor, for all d.
template <int kVectors>
FASTUNLEARN_INLINE void scale_columns(const Vector (&factor)[kVectors], int64_t depth, float* out,
                                      int64_t stride) {
  for (int64_t d = 0; d < depth; ++d)
    for (int c = 0; c < kVectors; ++c) {
      float* place = out + d * stride + c * kLanes;
      store(place, factor[c] * load(place));
    }
}

/// out[r] += sum over i of weights[r][i] rows[i], for kRows rows of `depth` numbers; V has as many lanes as
/// divide it.
template <class V, int kRows>
FASTUNLEARN_INLINE void add_weighted_rows(const float* weights, int64_t weight_stride, const float* rows,
                                          int64_t count, int64_t depth, float* out) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t begin = 0; begin < count; begin += kTerms) {
    const int64_t end = begin + kTerms < count ? begin + kTerms : count;
    for (int64_t first = 0; first < depth; first += lanes) {
      V sums[kRows] = {};
      for (int64_t i = begin; i < end; ++i) {
        const V row = load<V>(rows + i * depth + first);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += weights[r * weight_stride + i] * row;
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        store(out + r * depth + first, load<V>(out + r * depth + first) + sums[r]);
    }
  }
}

}  // namespace
}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
