// The arguments of attention, and its operands in scratch memory: float32, a depth that is a multiple of 8,
// no gaps.
#pragma once

#include "attention_tiles.h"

namespace fastunlearn {

/// A tensor [B, H, S, D] whose last dimension has stride 1.
struct Heads {
  void* data;
  int64_t batch, head, row;  // strides, in elements
};

struct AttentionArgs {
  Type type;                                    // of all tensors but logsumexp
  int64_t heads, num_queries, num_keys, depth;  // H, Sq, Sk, D
  float scale;
  Heads query, key, value, out;
  float* logsumexp;                                  // [B, H, Sq]
  Heads grad_out, grad_query, grad_key, grad_value;  // of the gradient only
  float* scratch;  // of one thread: `attention_scratch` numbers, aligned for vectors
};

constexpr int64_t kMostLanes = 16;  // of an instruction set
constexpr int64_t kQueryTile = 32;  // queries whose weights are kept, at most
constexpr int64_t kKeyTile = 128;   // keys whose weights are kept
constexpr int64_t kQueryBlock = 4;  // in the gradient the number of queries is a multiple of it, with zeros

static inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

static inline int64_t attention_scratch(const AttentionArgs& a, bool backward) {
  const int64_t depth = rounded_up(a.depth, 8), queries = rounded_up(a.num_queries, kMostLanes);
  if (!backward) return (2 * a.num_keys + 3 * kQueryTile) * depth + kQueryTile * kKeyTile;
  return (3 * queries + 6 * kKeyTile) * depth + 2 * queries + 2 * kQueryTile * kKeyTile;
}

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {
namespace {

FASTUNLEARN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// [S, D] of one of the B H heads.
template <class T>
FASTUNLEARN_INLINE T* head_of(const Heads& tensor, int64_t head, int64_t heads) {
  return static_cast<T*>(tensor.data) + head / heads * tensor.batch + head % heads * tensor.head;
}

/// `count` rows times `factor`, then zero rows up to `padded_count`. kDepth is D where it is known, else 0.
template <int64_t kDepth, class T>
void pack(const T* from, int64_t stride, int64_t count, int64_t any_depth, float factor, int64_t padded_count,
          float* rows) {
  const int64_t depth = kDepth ? kDepth : any_depth, width = rounded_up(depth, 8);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < depth; ++d) rows[i * width + d] = factor * value<float>(from[i * stride + d]);
    for (int64_t d = depth; d < width; ++d) rows[i * width + d] = 0.0f;
  }
  for (int64_t i = count * width; i < padded_count * width; ++i) rows[i] = 0.0f;
}

template <int64_t kDepth, class T>
void unpack(const float* rows, int64_t count, int64_t any_depth, float factor, T* to, int64_t stride) {
  const int64_t depth = kDepth ? kDepth : any_depth, width = rounded_up(depth, 8);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < depth; ++d) assign(to[i * stride + d], factor * rows[i * width + d]);
}

#ifdef __clang__
#define FASTUNLEARN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTUNLEARN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes<4>::bits{__VA_ARGS__})
#endif

/// to[j][i] = from[i][j], for `rows` by `columns` numbers, both multiples of 4.
FASTUNLEARN_INLINE void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to,
                                  int64_t to_stride) {
  using Four = Lanes<4>::type;
  for (int64_t i = 0; i < rows; i += 4)
    for (int64_t j = 0; j < columns; j += 4) {
      const float* block = from + i * stride + j;
      const Four r0 = load<Four>(block), r1 = load<Four>(block + stride);
      const Four r2 = load<Four>(block + 2 * stride), r3 = load<Four>(block + 3 * stride);
      const Four low01 = FASTUNLEARN_SHUFFLE(r0, r1, 0, 4, 1, 5),
                 high01 = FASTUNLEARN_SHUFFLE(r0, r1, 2, 6, 3, 7);
      const Four low23 = FASTUNLEARN_SHUFFLE(r2, r3, 0, 4, 1, 5),
                 high23 = FASTUNLEARN_SHUFFLE(r2, r3, 2, 6, 3, 7);
      float* out = to + j * to_stride + i;
      store(out, FASTUNLEARN_SHUFFLE(low01, low23, 0, 1, 4, 5));
      store(out + to_stride, FASTUNLEARN_SHUFFLE(low01, low23, 2, 3, 6, 7));
      store(out + 2 * to_stride, FASTUNLEARN_SHUFFLE(high01, high23, 0, 1, 4, 5));
      store(out + 3 * to_stride, FASTUNLEARN_SHUFFLE(high01, high23, 2, 3, 6, 7));
    }
}

}  // namespace
}  // namespace fastunlearn::FASTUNLEARN_ISA

#undef FASTUNLEARN_SHUFFLE
#endif  // FASTUNLEARN_ISA
