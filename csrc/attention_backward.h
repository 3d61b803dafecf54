// The gradient of attention for one head. Weights p are made again from logsumexp; with delta = <dO, O> of
// each query
//   dV = p' dO,  dS = p (dO V' - delta),  dQ = scale dS K,  dK = scale dS' Q
// (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
#pragma once

#include "attention_pack.h"

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {
namespace {

/// One head in scratch: all queries, and one tile of keys.
struct GradientScratch {
  float *queries, *grads, *grad_queries;         // rows; the queries times scale
  float *logsumexp, *delta;                      // of each query
  float *keys, *rows;                            // [kKeyTile] rows; `rows` on their way from or to columns
  float *key_columns, *value_columns;            // [depth][kKeyTile]
  float *grad_key_columns, *grad_value_columns;  // [depth][kKeyTile]
  float *weights, *grad_scores;                  // [kQueryTile][kKeyTile]
};

static inline GradientScratch gradient_scratch(float* next, int64_t num_queries, int64_t depth) {
  const auto take = [&](int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  };
  const int64_t queries = rounded_up(num_queries, kMostLanes);
  GradientScratch s;
  s.queries = take(queries * depth);
  s.grads = take(queries * depth);
  s.grad_queries = take(queries * depth);
  s.logsumexp = take(queries);
  s.delta = take(queries);
  s.keys = take(kKeyTile * depth);
  s.rows = take(kKeyTile * depth);
  s.key_columns = take(kKeyTile * depth);
  s.value_columns = take(kKeyTile * depth);
  s.grad_key_columns = take(kKeyTile * depth);
  s.grad_value_columns = take(kKeyTile * depth);
  s.weights = take(kQueryTile * kKeyTile);
  s.grad_scores = take(kQueryTile * kKeyTile);
  return s;
}

/// Weights p and gradients dS of kRows queries and kVectors vectors of keys.
template <int kRows, int kVectors>
FASTUNLEARN_INLINE void grad_scores(const GradientScratch& s, int64_t depth, int64_t query, int64_t key,
                                    int64_t place) {
  Vector weights[kRows][kVectors], grad_weights[kRows][kVectors];
  products(s.queries + query * depth, s.key_columns + key, kKeyTile, depth, weights);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) {
      weights[r][c] = exp(weights[r][c] - s.logsumexp[query + r]);
      store(s.weights + place + r * kKeyTile + c * kLanes, weights[r][c]);
    }
  products(s.grads + query * depth, s.value_columns + key, kKeyTile, depth, grad_weights);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c)
      store(s.grad_scores + place + r * kKeyTile + c * kLanes,
            weights[r][c] * (grad_weights[r][c] - s.delta[query + r]));
}

/// Adds what queries [first, first + num_queries) and the tile's keys give to each other's gradients.
template <int64_t kDepth>
void add_tile_gradient(const GradientScratch& s, int64_t any_depth, int64_t first, int64_t num_queries,
                       int64_t num_keys) {
  const int64_t depth = kDepth ? kDepth : any_depth;
  int64_t i = 0;
  const auto score = [&](auto rows) {
    in_pairs(num_keys, [&](auto vectors, int64_t j) {
      grad_scores<decltype(rows)::value, decltype(vectors)::value>(s, depth, first + i, j, i * kKeyTile + j);
    });
  };
  for (; i + kRowBlock <= num_queries; i += kRowBlock) score(std::integral_constant<int, kRowBlock>{});
  for (; i < num_queries; i += kQueryBlock) score(std::integral_constant<int, kQueryBlock>{});

  const float *queries = s.queries + first * depth, *grads = s.grads + first * depth;
  in_pairs(num_keys, [&](auto vectors, int64_t j) {
    constexpr int kVectors = decltype(vectors)::value;
    accumulate<kVectors>(grads, num_queries, depth, s.weights + j, kKeyTile, s.grad_value_columns + j,
                         kKeyTile);
    accumulate<kVectors>(queries, num_queries, depth, s.grad_scores + j, kKeyTile, s.grad_key_columns + j,
                         kKeyTile);
  });

  constexpr bool whole_vectors = kLanes < 8 || (kDepth > 0 && kDepth % kLanes == 0);
  using Row = typename Lanes<whole_vectors ? kLanes : 8>::type;
  const auto add_rows = [&](auto rows) {
    add_weighted_rows<Row, decltype(rows)::value>(s.grad_scores + i * kKeyTile, kKeyTile, s.keys, num_keys,
                                                  depth, s.grad_queries + (first + i) * depth);
  };
  for (i = 0; i + 8 <= num_queries; i += 8) add_rows(std::integral_constant<int, 8>{});
  for (; i < num_queries; i += kQueryBlock) add_rows(std::integral_constant<int, kQueryBlock>{});
}

/// delta and logsumexp; zeros for queries that are none.
template <int64_t kDepth, class T>
void pack_query_terms(const AttentionArgs& a, int64_t head, const GradientScratch& s) {
  const int64_t depth = kDepth ? kDepth : a.depth, width = rounded_up(depth, 8);
  const T* out = head_of<T>(a.out, head, a.heads);
  for (int64_t i = 0; i < a.num_queries; ++i) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < depth; ++d) sum += s.grads[i * width + d] * value<float>(out[i * a.out.row + d]);
    s.delta[i] = sum;
    s.logsumexp[i] = a.logsumexp[head * a.num_queries + i];
  }
  for (int64_t i = a.num_queries; i < rounded_up(a.num_queries, kQueryBlock); ++i)
    s.delta[i] = s.logsumexp[i] = 0.0f;
}

template <int64_t kDepth, class T>
void attention_backward_head(const AttentionArgs& a, int64_t head) {
  const int64_t depth = rounded_up(kDepth ? kDepth : a.depth, 8),
                queries = rounded_up(a.num_queries, kQueryBlock);
  const GradientScratch s = gradient_scratch(a.scratch, a.num_queries, depth);
  const T *query = head_of<T>(a.query, head, a.heads), *grad = head_of<T>(a.grad_out, head, a.heads);
  const T *key = head_of<T>(a.key, head, a.heads), *value = head_of<T>(a.value, head, a.heads);
  T *grad_key = head_of<T>(a.grad_key, head, a.heads), *grad_value = head_of<T>(a.grad_value, head, a.heads);
  pack<kDepth>(query, a.query.row, a.num_queries, a.depth, a.scale, queries, s.queries);
  pack<kDepth>(grad, a.grad_out.row, a.num_queries, a.depth, 1.0f, queries, s.grads);
  pack_query_terms<kDepth, T>(a, head, s);
  __builtin_memset(s.grad_queries, 0, queries * depth * sizeof(float));

  for (int64_t j = 0; j < a.num_keys; j += kKeyTile) {
    const int64_t num_keys = smaller(kKeyTile, a.num_keys - j),
                  padded_keys = rounded_up(num_keys, kMostLanes);
    pack<kDepth>(value + j * a.value.row, a.value.row, num_keys, a.depth, 1.0f, padded_keys, s.rows);
    transpose(s.rows, padded_keys, depth, depth, s.value_columns, kKeyTile);
    pack<kDepth>(key + j * a.key.row, a.key.row, num_keys, a.depth, 1.0f, padded_keys, s.keys);
    transpose(s.keys, padded_keys, depth, depth, s.key_columns, kKeyTile);
    __builtin_memset(s.grad_key_columns, 0, kKeyTile * depth * sizeof(float));
    __builtin_memset(s.grad_value_columns, 0, kKeyTile * depth * sizeof(float));

    for (int64_t i = 0; i < queries; i += kQueryTile)
      add_tile_gradient<kDepth>(s, depth, i, smaller(kQueryTile, queries - i), num_keys);

    transpose(s.grad_key_columns, depth, padded_keys, kKeyTile, s.rows, depth);
    unpack<kDepth>(s.rows, num_keys, a.depth, 1.0f, grad_key + j * a.grad_key.row, a.grad_key.row);
    transpose(s.grad_value_columns, depth, padded_keys, kKeyTile, s.rows, depth);
    unpack<kDepth>(s.rows, num_keys, a.depth, 1.0f, grad_value + j * a.grad_value.row, a.grad_value.row);
  }
  unpack<kDepth>(s.grad_queries, a.num_queries, a.depth, a.scale, head_of<T>(a.grad_query, head, a.heads),
                 a.grad_query.row);
}

}  // namespace
}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
