// What lowpass_residual launches: arguments, block shapes, shared memory and the order of the kernels. Plain
// C++: csrc/lowpass_residual.cu, NVRTC and the CPU emulator of the tests read it;
// fastunlearn/ops/_lowpass_residual_cupy.py repeats it in Python (a test compares the two).
#pragma once

#ifdef __CUDACC__
#define FASTUNLEARN_BOTH __host__ __device__
#else
#define FASTUNLEARN_BOTH
#endif

namespace fastunlearn_lowpass {

enum Type { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Kernel parameters, passed by value. Images are NCHW with dense samples; strides count elements from one
// sample to the next.
struct Arguments {
  const void* prediction;
  const void* target;
  const void* weight;         // [batch] float32, or float64 where weight_is_double
  const float* band;          // [row_frequencies, column_frequencies] of 0 and 1
  const float* row_basis;     // [height, row_columns], orthonormal; column i belongs to frequency (i + 1) / 2
  const float* column_basis;  // [width, column_columns]
  float* energy;              // [batch]
  void* gradient;             // like prediction
  float* coefficients;        // scratch: [planes, splits, row_columns, panels * 2 * panel_frequencies]
  float* partials;            // scratch: [planes, terms]
  long long prediction_stride, target_stride, gradient_stride;
  int batch, channels, height, width;
  int row_frequencies, column_frequencies, row_columns, column_columns;
  int prediction_type, target_type, weight_is_double;
  float inside, outside;
  // Filled by make_plan():
  int vector;                     // groups of four pixels are aligned: they move as 16 bytes (float32) or 8
  int splits;                     // blocks of kRows rows in a plane
  int panels, panel_frequencies;  // groups of column frequencies: what a block takes at a time
  int selects;                    // blocks of `lowpass_select` for a plane
  int terms;             // partial energies of a plane; 0 where a block writes a sample's energy itself
  int planes_per_block;  // of `lowpass_plane`
};

static_assert(sizeof(Arguments) == 184, "the Python loader packs it field by field");

constexpr int kRows = 64;                       // image rows of a block
constexpr int kChunk = 32;                      // columns, and their mirror images, staged at a time
constexpr int kSlabPitch = kChunk + 4;          // floats
constexpr int kRowFrequencies = 72;             // columns of the row basis staged at a time,
constexpr int kRowPitch = kRowFrequencies + 4;  // as pairs of halves
constexpr int kSelectElements = 8 * 256;        // coefficients of a block of `lowpass_select`
constexpr int kPlaneThreads = 256;
constexpr int kPlaneShared = 99 * 1024;  // bytes: two blocks fit on an H100 or H200, one on an A100
constexpr int kWholeSampleBatch = 64;    // from here on there are samples enough to give each its own block

// Blocks of the streamed kernels: kTiles * 8 column frequencies in kWarps warps, half of them for cosines,
// half for sines. Fragments are read without bank conflicts from [row][k] floats with a pitch of 4 mod 8,
// from [k][column] floats with 8 mod 16, and from pairs of halves of either kind with 4 mod 8.
template <int kTiles_, int kWarps_, bool kPanels_, bool kSplit_>
struct Shape {
  static constexpr int kTiles = kTiles_, kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr bool kPanels = kPanels_;  // whether there may be more frequencies than that
  static constexpr bool kSplit = kSplit_;    // synthesis keeps its coefficients as pairs of halves
  static constexpr int kRowTiles = kRows / (16 * (kWarps / 2));  // of 16 rows, in a warp
  static constexpr int kFrequencies = 8 * kTiles, kColumns = 2 * kFrequencies, kPitch = kColumns + 4,
                       kDeepPitch = kColumns + 8;
  static constexpr int kHalves = kSplit ? 2 : 1, kCoefficientPitch = kSplit ? kPitch : kDeepPitch;
  // Floats of shared memory: the image's chunk and the column table, then the transformed rows and the row
  // basis
  static constexpr int kFold = 2 * kRows * kSlabPitch + 2 * kChunk * kPitch,
                       kReduce = kRows * (kDeepPitch + 2 * kRowPitch);
  // The rows of the spectrum; the row basis and the coefficients, then the column table and the image's chunk
  static constexpr int kSpectrum = kHalves * kRows * kPitch,
                       kExpand = kRows * kSlabPitch + kHalves * kChunk * kCoefficientPitch;
  static constexpr int kUnfold = kChunk * kPitch + 2 * kRows * kSlabPitch;
  static constexpr int kAnalysisShared = 4 * (kFold > kReduce ? kFold : kReduce);
  static constexpr int kSynthesisShared = 4 * (kSpectrum + (kExpand > kUnfold ? kExpand : kUnfold));
};
using Narrow = Shape<5, 4, false, true>;   // 256 columns up to a quarter of Nyquist
using Middle = Shape<9, 4, false, false>;  // 256 columns up to half of Nyquist
using Wide = Shape<17, 8, true, false>;    // every frequency of 256 columns, or more

// The kernels that FASTUNLEARN_KERNEL defines in lowpass_residual.cuh, in the order of its end.
enum Kernel {
  kPlane,
  kAnalysis,
  kSynthesis = kAnalysis + 3,
  kSynthesisResidual = kSynthesis + 3,
  kSelect = kSynthesisResidual + 3,
  kEnergy,
  kKernels
};

struct Step {
  int kernel, threads, shared;  // shared: bytes
  long long blocks;
};

struct Plan {
  Step steps[4];
  int count;
  long long coefficients, partials;  // floats of scratch
};

FASTUNLEARN_BOTH inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Floats from one row to the next of the arrays of `lowpass_plane`; = 4 mod 8.
FASTUNLEARN_BOTH inline int plane_pitch(int columns) { return (columns + 3) / 8 * 8 + 4; }

FASTUNLEARN_BOTH inline long long plane_shared(const Arguments& a, long long planes) {
  const long long column = plane_pitch(a.column_columns);
  const long long tables = a.width * column + static_cast<long long>(a.height) * plane_pitch(a.row_columns);
  const long long plane =
      static_cast<long long>(a.height) * (plane_pitch(a.width) + column) + a.row_columns * column;
  return 4 * (tables + planes * plane + kPlaneThreads / 32);
}

#ifndef __CUDACC_RTC__  // from here on for the host

template <class S>
inline void plan_streamed(Arguments& a, Plan& plan, int shape) {
  const long long planes = static_cast<long long>(a.batch) * a.channels;
  a.splits = ceil_div(a.height, kRows);
  a.panel_frequencies = S::kFrequencies;
  a.panels = ceil_div(a.column_frequencies, S::kFrequencies);
  const int elements = a.row_columns * a.panels * S::kColumns;
  a.selects = ceil_div(elements, kSelectElements);
  a.terms = a.selects + (a.outside != 0 ? a.splits : 0);
  plan.coefficients = planes * a.splits * elements;
  plan.steps[0] = {kAnalysis + shape, S::kThreads, S::kAnalysisShared, planes * a.splits * a.panels};
  plan.steps[1] = {kSelect, 256, 32, planes * a.selects};
  plan.steps[2] = {(a.outside != 0 ? kSynthesisResidual : kSynthesis) + shape, S::kThreads,
                   S::kSynthesisShared, planes * a.splits};
  plan.count = 3;
}

inline bool is_vector(const Arguments& a) {
  const auto aligned = [](const void* data, long long stride, int type) {
    return reinterpret_cast<unsigned long long>(data) % (type == kFloat32 ? 16 : 8) == 0 && stride % 4 == 0;
  };
  return a.width % 4 == 0 && aligned(a.prediction, a.prediction_stride, a.prediction_type) &&
         aligned(a.target, a.target_stride, a.target_type) &&
         aligned(a.gradient, a.gradient_stride, a.prediction_type);
}

// Planes that fit in shared memory take one launch, larger ones are streamed in three; a last tiny one adds
// the energies of a sample's blocks.
inline Plan make_plan(Arguments& a) {
  Plan plan = {};
  const long long planes = static_cast<long long>(a.batch) * a.channels;
  a.vector = is_vector(a);
  a.splits = a.panels = a.panel_frequencies = a.selects = a.terms = a.planes_per_block = 0;
  if (planes == 0) return plan;
  if (plane_shared(a, 1) <= kPlaneShared) {
    const bool whole =
        a.channels == 1 || (a.batch >= kWholeSampleBatch && plane_shared(a, a.channels) <= kPlaneShared);
    a.planes_per_block = whole ? a.channels : 1;
    a.terms = whole ? 0 : 1;
    plan.steps[plan.count++] = {kPlane, kPlaneThreads, static_cast<int>(plane_shared(a, a.planes_per_block)),
                                planes / a.planes_per_block};
  } else if (a.column_frequencies <= Narrow::kFrequencies) {
    plan_streamed<Narrow>(a, plan, 0);
  } else if (a.column_frequencies <= Middle::kFrequencies) {
    plan_streamed<Middle>(a, plan, 1);
  } else {
    plan_streamed<Wide>(a, plan, 2);
  }
  plan.partials = planes * a.terms;
  if (a.terms > 0) plan.steps[plan.count++] = {kEnergy, 128, 0, ceil_div(a.batch, 128)};
  return plan;
}

#endif

}  // namespace fastunlearn_lowpass
