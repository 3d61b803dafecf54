// Softmax attention of small heads on a CPU, and its gradient: one head is the work of one thread.
//
// A group of queries meets tile after tile of keys, with the running maximum and sum of the online softmax
// (Milakov and Gimelshein 2018, arXiv 1805.02867).
#pragma once

#include "attention_backward.h"

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {
namespace {

/// Of kVectors vectors of queries: the largest score so far, the sum of e^(score - largest), how to scale
/// older sums.
template <int kVectors>
struct Softmax {
  Vector largest[kVectors], sum[kVectors], factor[kVectors];
};

/// weights[key][query] = <key, query> for kRows keys, and the largest of each query.
template <int kRows, int kVectors>
FASTUNLEARN_INLINE void score(const float* keys, const float* queries, int64_t depth, float* weights,
                              Vector (&largest)[kVectors]) {
  Vector scores[kRows][kVectors];
  products(keys, queries, kQueryTile, depth, scores);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) {
      store(weights + r * kQueryTile + c * kLanes, scores[r][c]);
      largest[c] = larger(scores[r][c], largest[c]);
    }
}

/// The weights of a tile of keys, relative to the largest score until now.
template <int64_t kDepth, int kVectors>
FASTUNLEARN_INLINE void weigh(const float* keys, int64_t num_keys, const float* queries, int64_t depth,
                              float* weights, Softmax<kVectors>& softmax) {
  Vector largest[kVectors], sum[kVectors];
#pragma GCC unroll 2
  for (int c = 0; c < kVectors; ++c) largest[c] = softmax.largest[c], sum[c] = Vector{};
  int64_t j = 0;
  for (; j + kRowBlock <= num_keys; j += kRowBlock)
    score<kRowBlock>(keys + j * depth, queries, depth, weights + j * kQueryTile, largest);
  for (; j < num_keys; ++j) score<1>(keys + j * depth, queries, depth, weights + j * kQueryTile, largest);
  for (j = 0; j < num_keys; j += kTerms) {
    Vector part[kVectors] = {};
    for (int64_t i = j; i < smaller(j + kTerms, num_keys); ++i)
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) {
        float* place = weights + i * kQueryTile + c * kLanes;
        const Vector weight = exp(load(place) - largest[c]);
        store(place, weight);
        part[c] += weight;
      }
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) sum[c] += part[c];
  }
#pragma GCC unroll 2
  for (int c = 0; c < kVectors; ++c) {
    softmax.factor[c] = exp(softmax.largest[c] - largest[c]);
    softmax.sum[c] = softmax.factor[c] * softmax.sum[c] + sum[c];
    softmax.largest[c] = largest[c];
  }
}

/// All keys for one group: queries [depth][kQueryTile] -> out alike, and the logarithm of the sum of e^score.
template <int64_t kDepth, int kVectors>
void attend(const float* keys, const float* values, int64_t num_keys, const float* queries, int64_t any_depth,
            float* weights, float* out, float* logsumexp) {
  const int64_t depth = kDepth ? kDepth : any_depth;
  Softmax<kVectors> softmax;
  for (int c = 0; c < kVectors; ++c) softmax.largest[c] = Vector{} - __FLT_MAX__, softmax.sum[c] = Vector{};
  for (int64_t i = 0; i < depth * kQueryTile; ++i) out[i] = 0.0f;
  for (int64_t j = 0; j < num_keys; j += kKeyTile) {
    const int64_t count = smaller(kKeyTile, num_keys - j);
    weigh<kDepth>(keys + j * depth, count, queries, depth, weights, softmax);
    if (j > 0) scale_columns<kVectors>(softmax.factor, depth, out, kQueryTile);
    accumulate<kVectors>(values + j * depth, count, depth, weights, kQueryTile, out, kQueryTile);
  }
  for (int c = 0; c < kVectors; ++c) {
    softmax.factor[c] = 1.0f / softmax.sum[c];
    for (int lane = 0; lane < kLanes; ++lane)
      logsumexp[c * kLanes + lane] = softmax.largest[c][lane] + __builtin_logf(softmax.sum[c][lane]);
  }
  scale_columns<kVectors>(softmax.factor, depth, out, kQueryTile);
}

template <int64_t kDepth, class T>
void attention_head(const AttentionArgs& a, int64_t head) {
  const int64_t depth = rounded_up(kDepth ? kDepth : a.depth, 8);
  float* keys = a.scratch;
  float* values = keys + a.num_keys * depth;
  float* rows = values + a.num_keys * depth;  // of one group of queries
  float* queries = rows + kQueryTile * depth;
  float* out = queries + kQueryTile * depth;
  float* weights = out + kQueryTile * depth;
  pack<kDepth>(head_of<T>(a.key, head, a.heads), a.key.row, a.num_keys, a.depth, 1.0f, a.num_keys, keys);
  pack<kDepth>(head_of<T>(a.value, head, a.heads), a.value.row, a.num_keys, a.depth, 1.0f, a.num_keys,
               values);

  const T* query = head_of<T>(a.query, head, a.heads);
  T* result = head_of<T>(a.out, head, a.heads);
  in_pairs(a.num_queries, [&](auto vectors, int64_t begin) {
    constexpr int kVectors = decltype(vectors)::value;
    constexpr int64_t padded = kVectors * kLanes;
    const int64_t count = smaller(padded, a.num_queries - begin);
    float logsumexp[padded];
    pack<kDepth>(query + begin * a.query.row, a.query.row, count, a.depth, a.scale, padded, rows);
    transpose(rows, padded, depth, depth, queries, kQueryTile);
    attend<kDepth, kVectors>(keys, values, a.num_keys, queries, depth, weights, out, logsumexp);
    transpose(out, depth, padded, kQueryTile, rows, depth);
    unpack<kDepth>(rows, count, a.depth, 1.0f, result + begin * a.out.row, a.out.row);
    for (int64_t i = 0; i < count; ++i) a.logsumexp[head * a.num_queries + begin + i] = logsumexp[i];
  });
}

/// Calls `run(depth, T*)` with D as a constant where it is one that networks have, else 0.
template <class Run>
FASTUNLEARN_INLINE void with_constants(const AttentionArgs& a, Run run) {
  with_float_type(a.type, [&](auto* type) {
    if (a.depth == 8) return run(std::integral_constant<int64_t, 8>{}, type);
    if (a.depth == 16) return run(std::integral_constant<int64_t, 16>{}, type);
    run(std::integral_constant<int64_t, 0>{}, type);
  });
}

}  // namespace

/// Heads [begin, end) of the B H.
void attention(const AttentionArgs& a, int64_t begin, int64_t end) {
  with_constants(a, [&](auto depth, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t head = begin; head < end; ++head) attention_head<decltype(depth)::value, T>(a, head);
  });
}

void attention_backward(const AttentionArgs& a, int64_t begin, int64_t end) {
  with_constants(a, [&](auto depth, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t head = begin; head < end; ++head)
      attention_backward_head<decltype(depth)::value, T>(a, head);
  });
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
