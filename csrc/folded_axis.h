// The real Fourier basis of an axis (constant, cosines, sines) applied to a block of SIMD lanes, in both
// directions.
//
// Symmetry makes the products short. Under n -> N - n cosines are even and sines odd; under n -> N/2 - n
// those of even and of odd frequency differ in sign, and the ones of even frequency are the basis of an axis
// of half the length, where the same holds again. So a signal is folded: mirrored rows are replaced by their
// sums and differences, in place, until each row serves one family of basis functions, a `Leaf`. For N = 256
// and the frequencies up to N/4 that leaves 17 % of the multiplications.
#pragma once
#include <cstdint>

#include "numeric.h"

namespace fastunlearn {

// Rows (first + i, last - i), i < count, are replaced by their sum and by the second less the first.
struct Mirror {
  int64_t first, last, count;
};

// Folded rows [first_row, first_row + rows) determine the coefficients [first, first + count), by ascending
// frequency.
struct Leaf {
  int64_t first_row, rows, first, count;
  const void* table;  // [rows, count]: the basis functions at these rows
};

constexpr int64_t kMaxLeaves = 16;

struct FoldedAxis {
  int64_t size, coefficients;
  int64_t
      num_fours;  // rows n, N - n, N/2 - n, N/2 + n, for n = 1 to num_fours, are first folded twice, at once
  int64_t num_mirrors, num_leaves;
  Mirror mirrors[kMaxLeaves];
  Leaf leaves[kMaxLeaves];
};

constexpr int64_t kMaxBlock = 64;  // lanes of a block, at most

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64,
                  kMaxVectors = 4;  // 6 x 4 sums, 4 vectors and a factor: 29 of 32 registers
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32, kMaxVectors = 2;  // 6 x 2 sums, 2 vectors and a factor: 15 of 16
#elif defined(__aarch64__)
constexpr int64_t kVectorBytes = 16, kMaxVectors = 4;
#else
constexpr int64_t kVectorBytes = 16, kMaxVectors = 2;
#endif
constexpr int64_t kTileRows = 6;

template <class Real>
using Vector __attribute__((vector_size(kVectorBytes))) = Real;

template <class Real>
constexpr int64_t kLanes = kVectorBytes / sizeof(Real);

// Elements from row to row of a block.
template <int64_t kVectors, class Real>
constexpr int64_t kStride = kVectors * kLanes<Real>;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <class Real>
FASTUNLEARN_INLINE Vector<Real> load_vector(const Real* from) {
  Vector<Real> vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Real>
FASTUNLEARN_INLINE void store_vector(Real* to, Vector<Real> vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};

// Calls `run(first lane, lanes, Constant<number of vectors>)` for blocks of nearly equal width that cover
// `lanes`.
template <class Real, class Run>
FASTUNLEARN_INLINE void for_blocks(int64_t lanes, Run run) {
  int64_t vectors = parts(lanes, kLanes<Real>), first = 0;
  for (int64_t blocks = parts(vectors, kMaxVectors); blocks > 0; --blocks) {
    const int64_t width = parts(vectors, blocks), count = smaller(lanes - first, width * kLanes<Real>);
    if (width == 1) run(first, count, Constant<1>{});
    if (width == 2) run(first, count, Constant<2>{});
    if (width == 3) run(first, count, Constant<smaller(3, kMaxVectors)>{});
    if (width == 4) run(first, count, Constant<smaller(4, kMaxVectors)>{});
    vectors -= width;
    first += count;
  }
}

// --- folding

template <int64_t kVectors, bool kInverse, class Real>
FASTUNLEARN_INLINE void fold_fours(const FoldedAxis& axis, Real* rows) {
  constexpr int64_t stride = kStride<kVectors, Real>;
  for (int64_t n = 1; n <= axis.num_fours; ++n) {
    Real *one = rows + n * stride, *two = rows + (axis.size - n) * stride;
    Real *three = rows + (axis.size / 2 - n) * stride, *four = rows + (axis.size / 2 + n) * stride;
#pragma GCC unroll 4
    for (int64_t v = 0; v < stride; v += kLanes<Real>) {
      const Vector<Real> a = load_vector(one + v), b = load_vector(two + v), c = load_vector(three + v),
                         d = load_vector(four + v);
      const Vector<Real> even = kInverse ? a - c : a + b, odd = kInverse ? b + d : b - a;
      const Vector<Real> even_half = kInverse ? a + c : c + d, odd_half = kInverse ? d - b : d - c;
      store_vector<Real>(one + v, kInverse ? even - odd : even + even_half);
      store_vector<Real>(two + v, kInverse ? even + odd : odd - odd_half);
      store_vector<Real>(three + v, kInverse ? even_half - odd_half : even_half - even);
      store_vector<Real>(four + v, kInverse ? even_half + odd_half : odd_half + odd);
    }
  }
}

template <int64_t kVectors, bool kInverse, class Real>
FASTUNLEARN_INLINE void mirror(const Mirror& pairs, Real* rows) {
  constexpr int64_t stride = kStride<kVectors, Real>;
  Real *one = rows + pairs.first * stride, *two = rows + pairs.last * stride;
  for (int64_t i = 0; i < pairs.count; ++i, one += stride, two -= stride)
#pragma GCC unroll 4
    for (int64_t v = 0; v < stride; v += kLanes<Real>) {
      const Vector<Real> a = load_vector(one + v), b = load_vector(two + v);
      store_vector<Real>(one + v, kInverse ? a - b : a + b);
      store_vector<Real>(two + v, kInverse ? a + b : b - a);
    }
}

template <int64_t kVectors, class Real>
void fold(const FoldedAxis& axis, Real* rows) {
  fold_fours<kVectors, false>(axis, rows);
  for (int64_t i = 0; i < axis.num_mirrors; ++i) mirror<kVectors, false>(axis.mirrors[i], rows);
}

// The transpose of `fold`.
template <int64_t kVectors, class Real>
void unfold(const FoldedAxis& axis, Real* rows) {
  for (int64_t i = axis.num_mirrors - 1; i >= 0; --i) mirror<kVectors, true>(axis.mirrors[i], rows);
  fold_fours<kVectors, true>(axis, rows);
}

// --- products with the tables

// Memory that will be read soon. The products leave the memory bus idle, so they fetch it, kLines cache lines
// in each term of a sum.
class Ahead {
 public:
  static constexpr int64_t kLines = 2;

  void add(const void* data, int64_t bytes) { spans_[count_++] = {static_cast<const char*>(data), bytes}; }

  // Where the next `terms` terms start to fetch.
  const char* take(int64_t terms) {
    while (count_ > 1 && spans_[count_ - 1].bytes <= 0) --count_;
    Span& span = spans_[count_ - 1];
    const char* first = span.data;
    if (span.bytes > 0) span.data += 64 * kLines * terms, span.bytes -= 64 * kLines * terms;
    return first;
  }

 private:
  struct Span {
    const char* data;
    int64_t bytes;
  } spans_[3] = {};
  int64_t count_ = 1;  // the first span is empty
};

// out[i] = sum_k table[k][i] in[k], i < kRows, for rows of kVectors vectors; or the same with the table
// transposed.
template <int64_t kRows, int64_t kVectors, bool kTransposed, class Real>
void product(const Real* table, int64_t table_stride, int64_t terms, const Real* in, int64_t in_stride,
             Real* out, int64_t out_stride, const char* ahead) {
  Vector<Real> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < terms; ++k, in += in_stride) {
    for (int64_t line = 0; line < Ahead::kLines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    Vector<Real> row[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) row[v] = load_vector(in + v * kLanes<Real>);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      const Real factor = kTransposed ? table[i * table_stride + k] : table[k * table_stride + i];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) sum[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v)
      store_vector<Real>(out + i * out_stride + v * kLanes<Real>, sum[i][v]);
}

template <int64_t kVectors, bool kTransposed, class Real>
void products(const Real* table, int64_t table_stride, int64_t terms, const Real* in, int64_t in_stride,
              int64_t rows, Real* out, int64_t out_stride, Ahead& ahead) {
  for (int64_t tiles = parts(rows, kTileRows); tiles > 0; --tiles) {
    const int64_t tile = parts(rows, tiles);
    const char* lines = ahead.take(terms);
    const auto run = [&](auto height) {
      product<decltype(height)::value, kVectors, kTransposed>(table, table_stride, terms, in, in_stride, out,
                                                              out_stride, lines);
    };
    switch (tile) {
      case 1:
        run(Constant<1>{});
        break;
      case 2:
        run(Constant<2>{});
        break;
      case 3:
        run(Constant<3>{});
        break;
      case 4:
        run(Constant<4>{});
        break;
      case 5:
        run(Constant<5>{});
        break;
      default:
        run(Constant<kTileRows>{});
    }
    table += tile * (kTransposed ? table_stride : 1);
    out += tile * out_stride;
    rows -= tile;
  }
}

// Coefficients of folded rows, the first counts[l] of leaf l, to rows at distance `stride`.
template <int64_t kVectors, class Real>
void analyse(const FoldedAxis& axis, const int64_t* counts, const Real* rows, Real* coefficients,
             int64_t stride, Ahead& ahead) {
  for (int64_t l = 0; l < axis.num_leaves; ++l) {
    const Leaf& leaf = axis.leaves[l];
    products<kVectors, false>(static_cast<const Real*>(leaf.table), leaf.count, leaf.rows,
                              rows + leaf.first_row * kStride<kVectors, Real>, kStride<kVectors, Real>,
                              counts[l], coefficients + leaf.first * stride, stride, ahead);
  }
}

// The transpose of `analyse`.
template <int64_t kVectors, class Real>
void synthesise(const FoldedAxis& axis, const int64_t* counts, const Real* coefficients, int64_t stride,
                Real* rows, Ahead& ahead) {
  for (int64_t l = 0; l < axis.num_leaves; ++l) {
    const Leaf& leaf = axis.leaves[l];
    products<kVectors, true>(static_cast<const Real*>(leaf.table), leaf.count, counts[l],
                             coefficients + leaf.first * stride, stride, leaf.rows,
                             rows + leaf.first_row * kStride<kVectors, Real>, kStride<kVectors, Real>, ahead);
  }
}

// --- transposition

template <class Real>
struct Index;
template <>
struct Index<float> {
  typedef int32_t Of __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Index<double> {
  typedef int64_t Of __attribute__((vector_size(kVectorBytes)));
};

// The elements of `a` and `b` (numbered on from those of `a`) at `index`.
template <class Real>
FASTUNLEARN_INLINE Vector<Real> pick(Vector<Real> a, Vector<Real> b, typename Index<Real>::Of index) {
#ifdef __clang__
  Vector<Real> picked;
  for (int64_t k = 0; k < kLanes<Real>; ++k)
    picked[k] = index[k] < kLanes<Real> ? a[index[k]] : b[index[k] - kLanes<Real>];
  return picked;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// In each block of 2 kHalf x 2 kHalf swaps the two quarters beside the diagonal, then goes on within the
// quarters.
template <int64_t kHalf, class Real>
FASTUNLEARN_INLINE void transpose(Vector<Real>* tile) {
  if constexpr (kHalf > 0) {
    typename Index<Real>::Of low, high;
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes<Real>; ++k) {
      low[k] = k & kHalf ? kLanes<Real> + k - kHalf : k;
      high[k] = k & kHalf ? kLanes<Real> + k : k + kHalf;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes<Real>; ++i) {
      if (i & kHalf) continue;
      const Vector<Real> a = tile[i], b = tile[i + kHalf];
      tile[i] = pick<Real>(a, b, low);
      tile[i + kHalf] = pick<Real>(a, b, high);
    }
    transpose<kHalf / 2, Real>(tile);
  }
}

// rows[n][l] = sources[l][n] for n < size and kLanes lanes l. Reads up to a vector beyond the ends of the
// sources.
template <class Real>
void gather_lanes(Real* const* sources, int64_t size, Real* rows, int64_t stride) {
  for (int64_t n = 0; n < size; n += kLanes<Real>) {
    Vector<Real> tile[kLanes<Real>];
#pragma GCC unroll 16
    for (int64_t l = 0; l < kLanes<Real>; ++l) tile[l] = load_vector(sources[l] + n);
    transpose<kLanes<Real> / 2, Real>(tile);
    for (int64_t k = 0; k < smaller(kLanes<Real>, size - n); ++k)
      store_vector<Real>(rows + (n + k) * stride, tile[k]);
  }
}

// The inverse, for the first `count` lanes.
template <class Real>
void scatter_lanes(const Real* rows, int64_t stride, int64_t size, Real* const* targets, int64_t count) {
  for (int64_t n = 0; n < size; n += kLanes<Real>) {
    Vector<Real> tile[kLanes<Real>];
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes<Real>; ++k)
      tile[k] = load_vector(rows + smaller(n + k, size - 1) * stride);
    transpose<kLanes<Real> / 2, Real>(tile);
    const int64_t bytes = smaller(kLanes<Real>, size - n) * sizeof(Real);
    for (int64_t l = 0; l < count; ++l)
      if (bytes == kVectorBytes)
        store_vector<Real>(targets[l] + n, tile[l]);
      else
        __builtin_memcpy(targets[l] + n, &tile[l], bytes);
  }
}

}  // namespace
}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
