// The real Fourier basis of an axis (constant, cosines, sines) applied to a block of SIMD lanes, in both
// directions.
//
// Symmetry makes the products short. Under n -> N - n cosines are even and sines odd; under n -> N/2 - n
// those of even and of odd frequency differ in sign, and the ones of even frequency are the basis of an axis
// of half the length, where the same holds again. So a signal is folded: mirrored rows are replaced by their
// sums and differences, in place, until each row serves one family of basis functions, a `Leaf`.
//
// What is left are odd multiples of a frequency, and they are symmetric in the other direction: of K of them,
// number K - 1 - k is number k, but for a sign that alternates from row to row. So the even and the odd rows
// of a leaf are two smaller products with the first K/2 functions, whose sums and differences are all K; and
// the even rows are such a leaf again.
//
// For N = 256 both leave 6 % of the multiplications for all frequencies, and 12 % for those up to N/4.
#pragma once
#include <cstdint>

#include "numeric.h"

#if defined(FASTUNLEARN_ISA) && defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastunlearn {

// Rows (first + i, last - i), i < count, are replaced by their sum and by the second less the first.
struct Mirror {
  int64_t first, last, count;
};

// Folded rows first_row, first_row + row_step, ... of a leaf.
struct Part {
  int64_t first_row, row_step, rows;
  int64_t size;       // coefficients that these rows and those of the parts before them tell apart
  int64_t count;      // that these rows have a product for: half of them, in the first part all
  const void* table;  // [rows, count]: the basis functions at these rows
};

constexpr int64_t kMaxLeaves = 16, kMaxParts = 6;

// Rows that determine the coefficients [first, first + count), by ascending frequency, up to their signs.
// They may need more room than `count`: whoever wants more than half of a part gets all of it.
struct Leaf {
  int64_t first, count, num_parts;
  Part parts[kMaxParts];
};

struct FoldedAxis {
  int64_t size, coefficients;
  int64_t room;  // for the coefficients of all leaves
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

#ifdef __AVX512F__
// The first `count` lanes, fewer than a vector has, and nothing beyond them.
template <class Real>
FASTUNLEARN_INLINE Vector<Real> load_part(const Real* from, int64_t count) {
  if constexpr (sizeof(Real) == sizeof(float))
    return (Vector<Real>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  else
    return (Vector<Real>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
#endif

template <class Real>
FASTUNLEARN_INLINE void store_part(Real* to, Vector<Real> vector, int64_t count) {
#ifdef __AVX512F__
  if constexpr (sizeof(Real) == sizeof(float))
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)vector);
  else
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)vector);
#else
  __builtin_memcpy(to, &vector, count * sizeof(Real));
#endif
}

// Calls `run(first element, load, store)` for each vector of a row, of which the last may be a part. Where
// there are no masks it calls with single numbers, and the compiler makes vectors of them.
template <class Real, class Run>
FASTUNLEARN_INLINE void for_row(int64_t elements, Run run) {
#ifdef __AVX512F__
  int64_t i = 0;
  for (; i + kLanes<Real> <= elements; i += kLanes<Real>)
    run(
        i, [](const Real* from) { return load_vector(from); },
        [](Real* to, Vector<Real> vector) { store_vector<Real>(to, vector); });
  if (const int64_t rest = elements - i; rest > 0)
    run(
        i, [rest](const Real* from) { return load_part(from, rest); },
        [rest](Real* to, Vector<Real> vector) { store_part<Real>(to, vector, rest); });
#else
#pragma omp simd
  for (int64_t i = 0; i < elements; ++i)
    run(i, [](const Real* from) { return *from; }, [](Real* to, Real number) { *to = number; });
#endif
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
FASTUNLEARN_INLINE void mirror(const Mirror& pairs, Real* rows, int64_t stride) {
  Real *one = rows + pairs.first * stride, *two = rows + pairs.last * stride;
  for (int64_t i = 0; i < pairs.count; ++i, one += stride, two -= stride)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors * kLanes<Real>; v += kLanes<Real>) {
      const Vector<Real> a = load_vector(one + v), b = load_vector(two + v);
      store_vector<Real>(one + v, kInverse ? a - b : a + b);
      store_vector<Real>(two + v, kInverse ? a + b : b - a);
    }
}

template <int64_t kVectors, class Real>
void fold(const FoldedAxis& axis, Real* rows) {
  fold_fours<kVectors, false>(axis, rows);
  for (int64_t i = 0; i < axis.num_mirrors; ++i)
    mirror<kVectors, false>(axis.mirrors[i], rows, kStride<kVectors, Real>);
}

// The transpose of `fold`.
template <int64_t kVectors, class Real>
void unfold(const FoldedAxis& axis, Real* rows) {
  for (int64_t i = axis.num_mirrors - 1; i >= 0; --i)
    mirror<kVectors, true>(axis.mirrors[i], rows, kStride<kVectors, Real>);
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

// What a product does: whether it adds to what is there, and whether its table is transposed.
enum Product { kSet, kAdd, kSetTransposed };

// out[i] = sum_k table[k][i] in[k], i < kRows, for rows of kVectors vectors.
template <int64_t kRows, int64_t kVectors, Product kHow, class Real>
void product(const Real* table, int64_t table_stride, int64_t terms, const Real* in, int64_t in_stride,
             Real* out, int64_t out_stride, const char* ahead) {
  Vector<Real> sum[kRows][kVectors] = {};
  if constexpr (kHow == kAdd)
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) sum[i][v] = load_vector(out + i * out_stride + v * kLanes<Real>);
  for (int64_t k = 0; k < terms; ++k, in += in_stride) {
    for (int64_t line = 0; line < Ahead::kLines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    Vector<Real> row[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) row[v] = load_vector(in + v * kLanes<Real>);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      const Real factor = kHow == kSetTransposed ? table[i * table_stride + k] : table[k * table_stride + i];
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

template <int64_t kVectors, Product kHow, class Real>
void products(const Real* table, int64_t table_stride, int64_t terms, const Real* in, int64_t in_stride,
              int64_t rows, Real* out, int64_t out_stride, Ahead& ahead) {
  for (int64_t tiles = parts(rows, kTileRows); tiles > 0; --tiles) {
    const int64_t tile = parts(rows, tiles);
    const char* lines = ahead.take(terms);
    const auto run = [&](auto height) {
      product<decltype(height)::value, kVectors, kHow>(table, table_stride, terms, in, in_stride, out,
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
    table += tile * (kHow == kSetTransposed ? table_stride : 1);
    out += tile * out_stride;
    rows -= tile;
  }
}

// Coefficients of folded rows, the first `wanted` of a leaf at least, to rows at distance `stride`.
template <int64_t kVectors, class Real>
void analyse(const Leaf& leaf, int64_t wanted, const Real* rows, Real* coefficients, int64_t stride,
             Ahead& ahead) {
  constexpr int64_t row = kStride<kVectors, Real>;
  for (int64_t p = 0; p < leaf.num_parts; ++p) {
    const Part& part = leaf.parts[p];
    const Real *table = static_cast<const Real*>(part.table), *in = rows + part.first_row * row;
    const int64_t half = part.size - part.size / 2, count = smaller(wanted, part.count);
    if (p == 0) {
      products<kVectors, kSet>(table, part.count, part.rows, in, part.row_step * row, count, coefficients,
                               stride, ahead);
    } else if (wanted <= half) {
      products<kVectors, kAdd>(table, part.count, part.rows, in, part.row_step * row, count, coefficients,
                               stride, ahead);
    } else {
      // Those of these rows from the last place down, then sums and differences with those of the other rows.
      products<kVectors, kSet>(table, part.count, part.rows, in, part.row_step * row, part.count,
                               coefficients + (part.size - 1) * stride, -stride, ahead);
      mirror<kVectors, false>({0, part.size - 1, part.size / 2}, coefficients, stride);
    }
  }
}

// The transpose of `analyse`, from the first `wanted` coefficients, which it overwrites.
template <int64_t kVectors, class Real>
void synthesise(const Leaf& leaf, int64_t wanted, Real* coefficients, int64_t stride, Real* rows,
                Ahead& ahead) {
  constexpr int64_t row = kStride<kVectors, Real>;
  for (int64_t p = leaf.num_parts - 1; p >= 0; --p) {
    const Part& part = leaf.parts[p];
    const Real* table = static_cast<const Real*>(part.table);
    Real* out = rows + part.first_row * row;
    const int64_t half = part.size - part.size / 2, last = part.size - 1;
    if (p == 0 || wanted <= half) {
      products<kVectors, kSetTransposed>(table, part.count, smaller(wanted, part.count), coefficients, stride,
                                         part.rows, out, part.row_step * row, ahead);
    } else {
      // Coefficients that are not wanted are zero: sum and difference are the other one.
      const int64_t alone = part.size - wanted;
      for (int64_t k = 0; k < alone; ++k)
        __builtin_memcpy(coefficients + (last - k) * stride, coefficients + k * stride, row * sizeof(Real));
      mirror<kVectors, true>({alone, last - alone, part.size / 2 - alone}, coefficients, stride);
      products<kVectors, kSetTransposed>(table, part.count, part.count, coefficients + last * stride, -stride,
                                         part.rows, out, part.row_step * row, ahead);
      wanted = half;
    }
  }
}

// Of all leaves, the first counts[l] coefficients of leaf l.
template <int64_t kVectors, class Real>
void analyse(const FoldedAxis& axis, const int64_t* counts, const Real* rows, Real* coefficients,
             int64_t stride, Ahead& ahead) {
  for (int64_t l = 0; l < axis.num_leaves; ++l)
    analyse<kVectors>(axis.leaves[l], counts[l], rows, coefficients + axis.leaves[l].first * stride, stride,
                      ahead);
}

template <int64_t kVectors, class Real>
void synthesise(const FoldedAxis& axis, const int64_t* counts, Real* coefficients, int64_t stride, Real* rows,
                Ahead& ahead) {
  for (int64_t l = 0; l < axis.num_leaves; ++l)
    synthesise<kVectors>(axis.leaves[l], counts[l], coefficients + axis.leaves[l].first * stride, stride,
                         rows, ahead);
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
    if (const int64_t rest = size - n; rest >= kLanes<Real>)
      for (int64_t l = 0; l < count; ++l) store_vector<Real>(targets[l] + n, tile[l]);
    else
      for (int64_t l = 0; l < count; ++l) store_part<Real>(targets[l] + n, tile[l], rest);
  }
}

}  // namespace
}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
