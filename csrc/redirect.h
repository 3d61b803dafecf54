// redirect on a CPU: ReTrack's single target over the k nearest neighbours, from rows that are read where
// they lie.
//
// Two passes over a sample, block by block. The first takes the dot products <eps, x_j - a> that make the
// weights, the second the weighted mean about the heaviest neighbour, where next to nothing cancels, and it
// leaves out the neighbours that rounding would drop. Sums run in the compute type within a block and in
// float64 over blocks.
#pragma once

#include <cmath>
#include <type_traits>

#include "image_blocks.h"

namespace fastunlearn {

struct RedirectArgs {
  Rows images;                 // B samples
  Rows neighbors;              // B k samples: neighbour j of sample b is sample b k + j
  const double* coefficients;  // [B, 5]: alpha, sigma, a, b, c
  const double* sqdist;        // [B, k] ||a - x_j||^2, or null
  Noise noise;
  Extent extent;
  int64_t k;
  bool in_double;  // compute in double; spread and weights are of the compute type
  Output x_t, target;
  void *spread, *weights;  // [B], [B, k]
  void* noise_scratch;     // of this thread: as many numbers of the compute type as a sample has elements
  double* scratch;         // of this thread: 2 k
  int64_t* row_scratch;    // of this thread: k
};

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {

constexpr int64_t kSmallRow = 1 << 14;  // bytes

/// Elements whose squares add up in the compute type before they go to float64: 64 to a lane of float32,
/// whatever the width of the vectors. Squares have one sign, and the spread is a difference of their sums:
/// longer runs would cost it more digits than torch's sums do. With the widest vectors a run is a block.
#if defined(__AVX512F__)
constexpr int64_t kRun = 64 * 16;
#elif defined(__AVX2__)
constexpr int64_t kRun = 64 * 8;
#else
constexpr int64_t kRun = 64 * 4;
#endif

static inline int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

/// dots[j] += sum of eps (x_j - center) over a block, for N neighbours, which share the loads of eps and
/// center.
template <int N, class Real>
static void add_dots(const Real* const* x, const Real* __restrict__ center, const Real* __restrict__ eps,
                     int64_t count, double* dots) {
  static_assert(N == 1 || N == 2 || N == 4, "sums have names, not indices: the vectoriser wants them so");
  const Real *x0 = x[0], *x1 = x[N > 1 ? 1 : 0], *x2 = x[N > 2 ? 2 : 0], *x3 = x[N > 2 ? 3 : 0];
  Real sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
  for (int64_t i = 0; i < count; ++i) {
    sum0 += eps[i] * (x0[i] - center[i]);
    if constexpr (N > 1) sum1 += eps[i] * (x1[i] - center[i]);
    if constexpr (N > 2) sum2 += eps[i] * (x2[i] - center[i]);
    if constexpr (N > 2) sum3 += eps[i] * (x3[i] - center[i]);
  }
  dots[0] += sum0;
  if constexpr (N > 1) dots[1] += sum1;
  if constexpr (N > 2) dots[2] += sum2;
  if constexpr (N > 2) dots[3] += sum3;
}

/// squares[j] += ||x_j - center||^2 over a block, for N neighbours; differences and sums in float64.
template <int N, class Real>
static void add_squares(const Real* const* x, const Real* __restrict__ center, int64_t count,
                        double* squares) {
  static_assert(N == 1 || N == 2 || N == 4, "as in add_dots");
  const Real *x0 = x[0], *x1 = x[N > 1 ? 1 : 0], *x2 = x[N > 2 ? 2 : 0], *x3 = x[N > 2 ? 3 : 0];
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
  for (int64_t i = 0; i < count; ++i) {
    const double origin = center[i], y0 = x0[i] - origin, y1 = x1[i] - origin, y2 = x2[i] - origin,
                 y3 = x3[i] - origin;
    sum0 += y0 * y0;
    if constexpr (N > 1) sum1 += y1 * y1;
    if constexpr (N > 2) sum2 += y2 * y2;
    if constexpr (N > 2) sum3 += y3 * y3;
  }
  squares[0] += sum0;
  if constexpr (N > 1) squares[1] += sum1;
  if constexpr (N > 2) squares[2] += sum2;
  if constexpr (N > 2) squares[3] += sum3;
}

/// offset += sum_j p_j (x_j - center) over N neighbours; returns sum_j p_j ||x_j - center||^2.
template <int N, class Real>
static double add_offsets(const Real* const* x, const double* weights, const Real* __restrict__ center,
                          int64_t count, Real* __restrict__ offset) {
  static_assert(N == 1 || N == 2 || N == 4, "as in add_dots");
  const Real *x0 = x[0], *x1 = x[N > 1 ? 1 : 0], *x2 = x[N > 2 ? 2 : 0], *x3 = x[N > 2 ? 3 : 0];
  const Real p0 = weights[0], p1 = weights[N > 1 ? 1 : 0], p2 = weights[N > 2 ? 2 : 0],
             p3 = weights[N > 2 ? 3 : 0];
  double energy = 0;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t end = shorter(count, start + kRun);
    Real run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t i = start; i < end; ++i) {
      const Real y0 = x0[i] - center[i], y1 = x1[i] - center[i], y2 = x2[i] - center[i],
                 y3 = x3[i] - center[i];
      Real shift = p0 * y0, square = p0 * y0 * y0;
      if constexpr (N > 1) shift += p1 * y1, square += p1 * y1 * y1;
      if constexpr (N > 2) shift += p2 * y2 + p3 * y3, square += p2 * y2 * y2 + p3 * y3 * y3;
      offset[i] += shift;
      run += square;
    }
    energy += run;
  }
  return energy;
}

/// Calls `run(j, N)` for groups of N = 4, 2 or 1 (a compile-time constant) that make up [0, count).
template <class Run>
static void for_groups(int64_t count, Run run) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) run(j, std::integral_constant<int, 4>());
  if (j + 2 <= count) run(j, std::integral_constant<int, 2>()), j += 2;
  if (j < count) run(j, std::integral_constant<int, 1>());
}

template <class Real>
static double square_norm(const Real* __restrict__ x, int64_t count) {
  double sum = 0;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t end = shorter(count, start + kRun);
    Real run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t i = start; i < end; ++i) run += x[i] * x[i];
    sum += run;
  }
  return sum;
}

/// Dot products to weights, in place: softmax_j of rho <eps, x_j - a> - rho^2 / 2 (d_j - min d). Returns the
/// heaviest.
static int64_t softmax(double rho, const double* square_distances, int64_t k, double* dots_to_weights) {
  double nearest = square_distances[0];
  for (int64_t j = 1; j < k; ++j)
    if (square_distances[j] < nearest) nearest = square_distances[j];
  int64_t heaviest = 0;
  for (int64_t j = 0; j < k; ++j) {
    dots_to_weights[j] = rho * dots_to_weights[j] - 0.5 * rho * rho * (square_distances[j] - nearest);
    if (dots_to_weights[j] > dots_to_weights[heaviest]) heaviest = j;
  }
  const double largest = dots_to_weights[heaviest];
  double total = 0;
  for (int64_t j = 0; j < k; ++j) total += dots_to_weights[j] = std::exp(dots_to_weights[j] - largest);
  for (int64_t j = 0; j < k; ++j) dots_to_weights[j] /= total;
  return heaviest;
}

/// Where to read ahead: in these rows, `blocks` blocks further. Gathered rows lie anywhere, and the processor
/// does not guess where. Small ones are asked for a sample ahead, large ones a block ahead.
struct Ahead {
  const int64_t* rows;  // [k]; null: nowhere
  int64_t blocks;
};

static inline Ahead look_ahead(const RedirectArgs& args, int64_t sample, bool last) {
  const int64_t* rows = args.neighbors.index;
  if (rows == nullptr) return {nullptr, 0};
  const int64_t bytes = args.extent.channels * args.extent.pixels * size_of(args.neighbors.type);
  if (bytes > kSmallRow) return {rows + sample * args.k, 1};
  return {last ? nullptr : rows + (sample + 1) * args.k, 0};
}

/// Always inline: the compiler drops calls of functions that do nothing but prefetch.
FASTUNLEARN_INLINE void prefetch(const Rows& rows, int64_t start, int64_t count) {
  const int64_t size = size_of(rows.type);
  const char* stored = static_cast<const char*>(rows.data) + start * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(stored + i);
}

/// One sample. `last`: there is none after it.
template <class Real>
static void redirect_sample(const RedirectArgs& args, int64_t sample, bool last) {
  const int64_t k = args.k, elements = args.extent.channels * args.extent.pixels;
  const double* coefficients = args.coefficients + 5 * sample;
  int64_t* const rows = args.row_scratch;
  double *const weights = args.scratch, *const squares = weights + k;
  for (int64_t j = 0; j < k; ++j) {
    rows[j] = args.neighbors.index != nullptr ? args.neighbors.index[sample * k + j] : sample * k + j;
    weights[j] = squares[j] = 0.0;
  }

  alignas(64) Real image_scratch[kBlock], heaviest_scratch[kBlock], neighbor_scratch[4][kBlock],
      offset[kBlock];
  alignas(64) Real x_t_scratch[kScratch], target_scratch[kScratch];
  const Real* neighbor[4];
  const int64_t image = args.images.index != nullptr ? args.images.index[sample] : sample;
  const auto read_image = [&](int64_t start, int64_t count) {
    return read(args.images.data, args.images.type, image * elements + start, count, image_scratch);
  };
  const auto read_neighbor = [&](int64_t row, int64_t start, int64_t count, Real* scratch) {
    return read(args.neighbors.data, args.neighbors.type, row * elements + start, count, scratch);
  };
  const auto read_neighbors = [&](int64_t first, int n, int64_t start, int64_t count) {
    for (int i = 0; i < n; ++i)
      neighbor[i] = read_neighbor(rows[first + i], start, count, neighbor_scratch[i]);
  };

  // First pass: dot products, and squared distances where they are not given.
  const Ahead ahead = look_ahead(args, sample, last);
  const bool noise_in_place = args.noise.data != nullptr && args.noise.type == kType<Real>;
  Real* const made_noise = static_cast<Real*>(args.noise_scratch);  // kept for the second pass
  const Real* const noise =
      noise_in_place ? static_cast<const Real*>(args.noise.data) + sample * elements : made_noise;
  for (int64_t start = 0; start < elements; start += kBlock) {
    const int64_t count = shorter(elements - start, kBlock);
    const int64_t next = start + ahead.blocks * kBlock;
    const Real *eps = noise + start, *center = read_image(start, count);
    if (args.noise.data == nullptr) {
      make_noise(args.noise, sample, start, count, made_noise + start);
    } else if (!noise_in_place) {
      read(args.noise.data, args.noise.type, sample * elements + start, count, made_noise + start);
    }
    for_groups(k, [&](int64_t j, auto n) {
      read_neighbors(j, n, start, count);
      for (int i = 0; i < n && ahead.rows != nullptr && next < elements; ++i)
        prefetch(args.neighbors, ahead.rows[j + i] * elements + next, shorter(elements - next, count));
      add_dots<n>(neighbor, center, eps, count, weights + j);
      if (args.sqdist == nullptr) add_squares<n>(neighbor, center, count, squares + j);
    });
  }

  const double rho = coefficients[0] / coefficients[1];
  const int64_t heaviest =
      softmax(rho, args.sqdist != nullptr ? args.sqdist + sample * k : squares, k, weights);
  const int64_t heaviest_row = rows[heaviest];
  constexpr double negligible = kType<Real> == Type::kFloat ? 0x1p-32 : 0x1p-61;  // 2^-8 of the rounding unit
  int64_t others =
      0;  // neighbours that count beside the heaviest: moved to the front, their weights to `squares`
  for (int64_t j = 0; j < k; ++j) {
    static_cast<Real*>(args.weights)[sample * k + j] = static_cast<Real>(weights[j]);
    if (j == heaviest || weights[j] < negligible) continue;  // a NaN counts
    rows[others] = rows[j];
    squares[others++] = weights[j];
  }

  // Second pass: x_t, and the target from the weighted mean about the heaviest neighbour.
  const Real alpha = static_cast<Real>(coefficients[0]), sigma = static_cast<Real>(coefficients[1]);
  const Real of_noise = static_cast<Real>(coefficients[2]), of_clean = static_cast<Real>(coefficients[3]);
  const Real of_offset = static_cast<Real>(coefficients[4]);
  double energy = 0.0, mean_energy = 0.0;
  for (int64_t i = 0; i < kBlock; ++i) offset[i] = 0;
  for_blocks(args.extent, [&](const Block& block) {
    const Real* x_t = gather(block, x_t_scratch, [&](int64_t start, int64_t count, Real* out) {
      const Real *clean = read_image(start, count), *eps = noise + start;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = alpha * clean[i] + sigma * eps[i];
      return out;
    });
    write<Real>(args.x_t, elements, sample, block, [=](int64_t i) { return x_t[i]; });

    const Real* target = gather(block, target_scratch, [&](int64_t start, int64_t count, Real* out) {
      const Real *clean = read_image(start, count), *eps = noise + start;
      const Real* center = read_neighbor(heaviest_row, start, count, heaviest_scratch);
      if (others > 0) {
        for (int64_t i = 0; i < count; ++i) offset[i] = 0;
        for_groups(others, [&](int64_t j, auto n) {
          read_neighbors(j, n, start, count);
          energy += add_offsets<n>(neighbor, squares + j, center, count, offset);
        });
        mean_energy += square_norm(offset, count);
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        out[i] = of_noise * eps[i] + of_clean * clean[i] + of_offset * ((clean[i] - center[i]) - offset[i]);
      return out;
    });
    write<Real>(args.target, elements, sample, block, [=](int64_t i) { return target[i]; });
  });
  const double spread = coefficients[4] * coefficients[4] * (energy - mean_energy);
  static_cast<Real*>(args.spread)[sample] = static_cast<Real>(spread < 0.0 ? 0.0 : spread);
}

/// Samples [begin, end).
void redirect(const RedirectArgs& args, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const bool last = sample + 1 == end;
    args.in_double ? redirect_sample<double>(args, sample, last) : redirect_sample<float>(args, sample, last);
  }
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
