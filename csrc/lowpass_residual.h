// Energy of a band of spatial frequencies of r = prediction - target, and its gradient: the projection
// P r = U_H [mask o (U_H' r U_W)] U_W' in the real Fourier basis U of each axis (csrc/folded_axis.h), as
// matrix products in the cache.
//
// An axis is transformed as the rows of a block whose columns are SIMD lanes. The H axis comes first, with
// image columns as lanes (those of several planes side by side, where planes are small); then, transposed,
// the W axis with the coefficients of the H axis as lanes.
#pragma once
#include <cstdint>

#include "folded_axis.h"

namespace fastunlearn {

struct LowpassResidualArgs {
  Type prediction_type, target_type;  // the gradient has that of the prediction
  Type compute_type;                  // float or double: that of the tables, the mask and the scratch
  const void *prediction, *target;    // [B, C, H, W], samples dense
  void* gradient;                     // [B, C, H, W], dense
  bool stream;                        // the gradient bypasses the caches; its rows are whole cache lines
  int64_t prediction_stride, target_stride;  // elements from sample to sample
  int64_t channels;
  const double* weight;  // [B]
  double inside, outside;
  FoldedAxis height, width;
  const int64_t* lane_place;           // [height.coefficients]: lane, by frequency -> place among the leaves
  const void* mask;                    // [width.room, lane_stride]: 0 or 1, once for each plane
  const int64_t* reach;                // [width.room]: lanes of a plane up to the last 1 of the mask
  int64_t planes;                      // that are transformed side by side
  int64_t column_stride, lane_stride;  // `row_stride` of their columns and lanes
  double* energy;                      // [B, C], without the weight
  void* scratch;                       // of one thread, `lowpass_scratch` elements, at a cache line
};

// Elements from row to row: room for a vector beyond the last column, and an odd number of cache lines, so
// that rows do not compete for the same sets of a cache.
constexpr int64_t row_stride(int64_t columns) { return ((columns + 31) / 16 | 1) * 16; }

constexpr int64_t lowpass_scratch(const LowpassResidualArgs& args) {
  const int64_t longest = args.height.size > args.width.size ? args.height.size : args.width.size;
  return (longest + args.width.room + 3 * args.height.size) * kMaxBlock +
         args.height.room * args.column_stride + args.lane_stride;
}

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {
namespace {

template <class Real>
FASTUNLEARN_INLINE void stream_vector(Real* to, Vector<Real> vector) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)vector);
#elif defined(__AVX__)
  _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)vector);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)vector);
#else
  store_vector<Real>(to, vector);
#endif
}

// Columns [column, column + columns) of a plane, or all columns of several planes, side by side.
struct Block {
  int64_t plane, planes, column, columns;
};

// Up to args.planes planes at once.
template <class Real>
class Planes {
 public:
  // Planes [first, first + count) of the B * C planes; the `next` ones after them are fetched meanwhile.
  Planes(const LowpassResidualArgs& args, int64_t first, int64_t count, int64_t next)
      : args_(args), first_(first), count_(count) {
    const int64_t longest = larger(args.height.size, args.width.size);
    block_ = static_cast<Real*>(args.scratch);                          // [H or W, lanes of the block]
    coefficients_ = block_ + longest * kMaxBlock;                       // [height.room, column_stride]
    spectrum_ = coefficients_ + args.height.room * args.column_stride;  // [width.room, kMaxBlock]
    converted_ = spectrum_ + args.width.room * kMaxBlock;               // [3, H, kMaxBlock]
    energy_ = converted_ + 3 * args.height.size * kMaxBlock;            // [lanes]
    for (int64_t l = 0; l < args.height.num_leaves; ++l) all_[l] = args.height.leaves[l].count;
    if (next > 0) {
      look_ahead(args.prediction, args.prediction_type, args.prediction_stride, next);
      look_ahead(args.target, args.target_type, args.target_stride, next);
    }
  }

  void run() {
    const FoldedAxis& height = args_.height;
    for_image_blocks([&](const Block& block, Real* coefficients, auto vectors) {
      constexpr int64_t kVectors = decltype(vectors)::value;
      subtract(block, kStride<kVectors, Real>);
      fold<kVectors>(height, block_);
      analyse<kVectors>(height, all_, block_, coefficients, args_.column_stride, ahead_);
    });
    for_blocks<Real>(count_ * height.coefficients,
                     [&](int64_t lane, int64_t lanes, auto vectors) { filter(lane, lanes, vectors); });
    for (int64_t p = 0; p < count_; ++p) {
      double energy = 0;
#pragma omp simd reduction(+ : energy)
      for (int64_t lane = p * height.coefficients; lane < (p + 1) * height.coefficients; ++lane)
        energy += static_cast<double>(energy_[lane]);
      args_.energy[first_ + p] = args_.inside * args_.inside * energy;
    }
    for_image_blocks([&](const Block& block, Real* coefficients, auto vectors) {
      constexpr int64_t kVectors = decltype(vectors)::value;
      synthesise<kVectors>(height, all_, coefficients, args_.column_stride, block_, ahead_);
      unfold<kVectors>(height, block_);
      write(block, kStride<kVectors, Real>);
    });
  }

 private:
  static constexpr Type kType = sizeof(Real) == sizeof(float) ? Type::kFloat : Type::kDouble;

  // The columns of a block in one plane.
  struct Rows {
    const Real* data;
    int64_t stride;
    const Real* row(int64_t n) const { return data + n * stride; }
  };

  // --- where things are

  int64_t planes_in_block() const { return larger(1, kMaxVectors * kLanes<Real> / args_.width.size); }

  // The coefficients of plane p.
  Real* coefficients_of(int64_t p) const {
    const int64_t together = planes_in_block(),
                  lanes = parts(together * args_.width.size, kLanes<Real>) * kLanes<Real>;
    return coefficients_ + p / together * lanes + p % together * args_.width.size;
  }

  template <class Run>
  void for_image_blocks(Run run) {
    const int64_t width = args_.width.size, together = planes_in_block();
    for (int64_t p = 0; p < count_; p += together) {
      const int64_t planes = smaller(together, count_ - p);
      for_blocks<Real>(planes * width, [&](int64_t column, int64_t columns, auto vectors) {
        const Block block = {p, planes, column, planes > 1 ? width : columns};
        run(block, coefficients_of(p) + column, vectors);
      });
    }
  }

  int64_t start_of(int64_t p, int64_t column, int64_t sample_stride) const {
    const int64_t sample = (first_ + p) / args_.channels, channel = (first_ + p) % args_.channels;
    return sample * sample_stride + channel * args_.height.size * args_.width.size + column;
  }

  void look_ahead(const void* array, Type type, int64_t sample_stride, int64_t planes) {
    const int64_t size = type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
    ahead_.add(static_cast<const char*>(array) + start_of(count_, 0, sample_stride) * size,
               planes * args_.height.size * args_.width.size * size);
  }

  Rows prediction(int64_t p, const Block& block) {
    return rows(args_.prediction, args_.prediction_type, start_of(p, block.column, args_.prediction_stride),
                block.columns, converted_);
  }

  Rows target(int64_t p, const Block& block) {
    Real* scratch = converted_ + args_.height.size * kMaxBlock;
    return rows(args_.target, args_.target_type, start_of(p, block.column, args_.target_stride),
                block.columns, scratch);
  }

  Rows rows(const void* array, Type type, int64_t start, int64_t columns, Real* scratch) {
    const int64_t width = args_.width.size;
    if (type == kType) return {static_cast<const Real*>(array) + start, width};
    with_float_type(type, [&](auto* tag) {
      const auto* stored = static_cast<decltype(tag)>(const_cast<void*>(array)) + start;
      for (int64_t n = 0; n < args_.height.size; ++n)
        load(stored + n * width, columns, scratch + n * kMaxBlock);
    });
    return {scratch, kMaxBlock};
  }

  // --- what is done

  void subtract(const Block& block, int64_t stride) {
    for (int64_t p = block.plane; p < block.plane + block.planes; ++p) {
      const Rows x = prediction(p, block), y = target(p, block);
      for (int64_t n = 0; n < args_.height.size; ++n) {
        const Real *xn = x.row(n), *yn = y.row(n);
        Real* r = block_ + n * stride + (p - block.plane) * block.columns;
        for_row<Real>(block.columns,
                      [&](int64_t w, auto load, auto store) { store(r + w, load(xn + w) - load(yn + w)); });
      }
    }
  }

  // The W axis of lanes [lane, lane + count): to the spectrum, masked, and back. Keeps the energy of each
  // lane.
  template <class Vectors>
  void filter(int64_t lane, int64_t count, Vectors) {
    constexpr int64_t kVectors = Vectors::value, stride = kStride<kVectors, Real>;
    const FoldedAxis& width = args_.width;
    Real* places[stride];
    place_lanes(lane, count, stride, places);
    for (int64_t v = 0; v < stride; v += kLanes<Real>)
      gather_lanes<Real>(places + v, width.size, block_ + v, stride);
    int64_t counts[kMaxLeaves];
    count_coefficients(lane, count, counts);
    fold<kVectors>(width, block_);
    analyse<kVectors>(width, counts, block_, spectrum_, kMaxBlock, ahead_);
    Vector<Real> energy[kVectors] = {};
    for (int64_t l = 0; l < width.num_leaves; ++l)
      for (int64_t c = width.leaves[l].first; c < width.leaves[l].first + counts[l]; ++c)
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
          Real* at = spectrum_ + c * kMaxBlock + v * kLanes<Real>;
          const Vector<Real> mask = load_vector(static_cast<const Real*>(args_.mask) + c * args_.lane_stride +
                                                lane + v * kLanes<Real>);
          const Vector<Real> kept = mask * load_vector(at);
          energy[v] += kept * kept;
          store_vector<Real>(at, kept);
        }
    for (int64_t v = 0; v < kVectors; ++v) store_vector<Real>(energy_ + lane + v * kLanes<Real>, energy[v]);
    synthesise<kVectors>(width, counts, spectrum_, kMaxBlock, block_, ahead_);
    unfold<kVectors>(width, block_);
    for (int64_t v = 0; v < count; v += kLanes<Real>)
      scatter_lanes<Real>(block_ + v, stride, width.size, places + v, smaller(kLanes<Real>, count - v));
  }

  // Where the coefficients of each lane start; lanes beyond the last repeat it.
  void place_lanes(int64_t lane, int64_t count, int64_t places_count, Real** places) const {
    const int64_t lanes = args_.height.coefficients;
    int64_t p = lane / lanes, i = lane % lanes;
    Real* plane = coefficients_of(p);
    for (int64_t l = 0; l < places_count; ++l) {
      places[l] = plane + args_.lane_place[i] * args_.column_stride;
      if (l < count - 1 && ++i == lanes) i = 0, plane = coefficients_of(++p);
    }
  }

  // Coefficients of each leaf up to the last one that the mask keeps in one of the lanes: fewer for a disc.
  void count_coefficients(int64_t lane, int64_t count, int64_t* counts) const {
    const int64_t lanes = args_.height.coefficients, last = lane + count - 1;
    const int64_t lowest =
        lane / lanes == last / lanes ? lane % lanes : 0;  // of these lanes, within their planes
    for (int64_t l = 0; l < args_.width.num_leaves; ++l) {
      const Leaf& leaf = args_.width.leaves[l];
      counts[l] = leaf.count;
      while (counts[l] > 0 && args_.reach[leaf.first + counts[l] - 1] <= lowest) --counts[l];
    }
  }

  // The gradient of a block, and the energy outside the band if it counts.
  void write(const Block& block, int64_t stride) {
    const bool direct = args_.prediction_type == kType;
    const int64_t height = args_.height.size, width = args_.width.size, columns = block.columns;
    for (int64_t p = block.plane; p < block.plane + block.planes; ++p) {
      const Real* projected = block_ + (p - block.plane) * columns;
      const int64_t start = start_of(p, block.column, args_.channels * height * width);
      Real* out = direct ? static_cast<Real*>(args_.gradient) + start : converted_ + 2 * height * kMaxBlock;
      const int64_t out_stride = direct ? width : kMaxBlock;
      const double scale = 2 * args_.weight[(first_ + p) / args_.channels],
                   outside = args_.outside * args_.outside;
      const Real of_band = static_cast<Real>(scale * args_.inside * args_.inside),
                 of_rest = static_cast<Real>(scale * outside);
      if (outside != 0) {
        const Rows x = prediction(p, block), y = target(p, block);
        double energy = 0;
        for (int64_t n = 0; n < height; ++n)
          energy += static_cast<double>(write_all(x.row(n), y.row(n), projected + n * stride, columns,
                                                  of_band, of_rest, out + n * out_stride));
        args_.energy[first_ + p] += outside * energy;
      } else {
        for (int64_t n = 0; n < height; ++n)
          write_band(projected + n * stride, columns, of_band, out + n * out_stride);
      }
      for (int64_t n = 0; n < height && !direct; ++n)
        store(out + n * kMaxBlock, columns, args_.prediction_type, args_.gradient, start + n * width, 1);
    }
  }

  void write_band(const Real* projected, int64_t columns, Real of_band, Real* out) {
    if (args_.stream) {
      for (int64_t w = 0; w < columns; w += kLanes<Real>)
        stream_vector<Real>(out + w, of_band * load_vector(projected + w));
    } else {
      for_row<Real>(columns,
                    [&](int64_t w, auto load, auto store) { store(out + w, of_band * load(projected + w)); });
    }
  }

  Real write_all(const Real* x, const Real* y, const Real* projected, int64_t columns, Real of_band,
                 Real of_rest, Real* out) {
    Real energy = 0;
#ifdef __AVX512F__
    // A reduction by the compiler adds up the end of a row, less than a vector, number by number.
    Vector<Real> energies = {};
    for_row<Real>(columns, [&](int64_t w, auto load, auto store) {
      const Vector<Real> kept = load(projected + w), rest = load(x + w) - load(y + w) - kept;
      store(out + w, of_band * kept + of_rest * rest);
      energies += rest * rest;
    });
    for (int64_t lane = 0; lane < kLanes<Real>; ++lane) energy += energies[lane];
#else
#pragma omp simd reduction(+ : energy)
    for (int64_t w = 0; w < columns; ++w) {
      const Real rest = x[w] - y[w] - projected[w];
      out[w] = of_band * projected[w] + of_rest * rest;
      energy += rest * rest;
    }
#endif
    return energy;
  }

  const LowpassResidualArgs& args_;
  const int64_t first_, count_;
  int64_t all_[kMaxLeaves];
  Real *block_, *coefficients_, *spectrum_, *converted_, *energy_;
  Ahead ahead_;
};

template <class Real>
void run_planes(const LowpassResidualArgs& args, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; plane += args.planes)
    Planes<Real>(args, plane, smaller(args.planes, end - plane),
                 smaller(args.planes, end - plane - args.planes))
        .run();
#ifdef __SSE2__
  if (args.stream) _mm_sfence();
#endif
}

}  // namespace

// Planes [begin, end) of the B * C planes.
void lowpass_residual(const LowpassResidualArgs& args, int64_t begin, int64_t end) {
  args.compute_type == Type::kDouble ? run_planes<double>(args, begin, end)
                                     : run_planes<float>(args, begin, end);
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
