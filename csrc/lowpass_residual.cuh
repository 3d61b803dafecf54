// lowpass_residual on NVIDIA GPUs (sm_80 and later): energy and gradient of a band of spatial frequencies,
// for any height and width. Device code without torch or any other header, so that it has two loaders:
// csrc/lowpass_residual.cu (nvcc) and fastunlearn/ops/_lowpass_residual_cupy.py (NVRTC). Matrix products run
// on tensor cores as three TF32 products (float32 accuracy).
//
// A plane r of H x W is projected on the band by P r = U_H [band o (U_H' r U_W)] U_W'. Small planes:
// lowpass_residual_plane.cuh. Large ones are streamed in blocks of kRows rows, so that every image is read
// once and written once, whatever the number of SMs:
//   analysis   T = r U_W of the block's rows, then their share U_H[rows]' T of the coefficients; reads two
//   planes select     adds the shares of a plane and applies the band: a few percent of a plane's bytes, in
//   the L2 cache synthesis  S = U_H[rows] C, then P r = S U_W'; reads the residual again only where the mask
//   is not 0 off the band
// Columns m and W - m are folded first: cosines need r[m] + r[W - m], sines r[m] - r[W - m], which halves
// table and arithmetic.
//
// Why these shapes (H200: 4.8 TB/s and about 100 TFLOP/s from mma.sync as 3xTF32; A100-40GB: 1.56 TB/s and
// 52): a 256 x 256 plane moves 0.79 MB in 0.16 us of an H200 and 0.51 us of an A100. It takes 4 H W V + 4 H
// (2 V - 1)^2 operations with the columns folded: 13 M at a quarter of Nyquist (V = 33: 0.13 and 0.25 us,
// memory-bound), 34 M at half of Nyquist (V = 65: 0.34 and 0.65 us, compute-bound). FFMA (67 and 19.5
// TFLOP/s) would need 0.19 and 0.66 us at a quarter. 64 x 64 and 32 x 32 planes take under 1 M operations:
// launch-bound.
#pragma once

#include "lowpass_residual_chunks.cuh"
#include "lowpass_residual_plane.cuh"

namespace fastunlearn_lowpass {

// An operand of synthesis.
template <bool kSplit>
struct OperandOf {
  using Type = float;
};
template <>
struct OperandOf<true> {
  using Type = uint2;
};

__device__ __forceinline__ long long coefficients_of(const Arguments& a, long long plane, int split,
                                                     int columns) {
  return (plane * a.splits + split) * (static_cast<long long>(a.row_columns) * columns);
}

template <class S>
__device__ __forceinline__ void analysis_kernel(const Arguments& a) {
  const int panel = blockIdx.x % a.panels, split_index = blockIdx.x / a.panels % a.splits;
  const long long plane_index = blockIdx.x / a.panels / a.splits;
  const int first_row = split_index * kRows, rows = min(kRows, a.height - first_row);
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * (16 * S::kRowTiles), sine = warp % 2,
            half = a.width / 2;
  const Plane plane(a, plane_index);

  float* const direct = lowpass_shared;  // [kRows][kSlabPitch]
  float* const mirror = direct + kRows * kSlabPitch;
  uint2* const table = reinterpret_cast<uint2*>(mirror + kRows * kSlabPitch);  // [kChunk][kPitch]
  const int tiles = tiles_of<S>(a, panel, sine);
  const float sign = sine ? -1.f : 1.f;

  float sum[S::kRowTiles][S::kTiles][4] = {};
  Group groups[ChunkGroups<S>::kCount];
  ChunkGroups<S>(a, 0).fetch(groups, a, plane, first_row, rows);
  float carry = 0.f;
  for (int first = 0; first <= half; first += kChunk) {
    const ChunkGroups<S> mine(a, first);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < mine.kCount; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        direct[mine.slab_index(i, e)] = residual(groups[i], a, mine.mask_of(i, rows), e);
    }
    if (threadIdx.x < kRows) mirror[threadIdx.x * kSlabPitch] = carry;
    stage_columns<S>(table, a, panel, first);
    __syncthreads();
    if (first + kChunk <= half) ChunkGroups<S>(a, first + kChunk).fetch(groups, a, plane, first_row, rows);
    multiply(
        sum, tiles, min(kChunk / 8, (half - first) / 8 + 1),
        [&](int row, int k) {
          const int at = (warp_row + row) * kSlabPitch + k;
          return direct[at] + sign * mirror[at];
        },
        [&](int k, int column) { return table[k * S::kPitch + sine * S::kFrequencies + column]; });
    if (threadIdx.x < kRows) carry = mirror[threadIdx.x * kSlabPitch + kChunk];
  }
  __syncthreads();

  float* const transformed = lowpass_shared;  // [kRows][kDeepPitch]
  uint2* const row_basis =
      reinterpret_cast<uint2*>(transformed + kRows * S::kDeepPitch);  // [kRows][kRowPitch]
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + 16 * i + row_of(e), column = sine * S::kFrequencies + 8 * j + column_of(e);
        transformed[row * S::kDeepPitch + column] = sum[i][j][e];
      }
    }
  }

  // The block's share of C[u][q]: 16 x 24 tiles of its transpose, shared among the warps.
  constexpr int kUnitTiles = 3, kUnits = kRowFrequencies / (8 * kUnitTiles);
  const int columns = a.panels * S::kColumns;
  float* const share =
      a.coefficients + coefficients_of(a, plane_index, split_index, columns) + panel * S::kColumns;
  for (int first = 0; first < a.row_columns; first += kRowFrequencies) {
    __syncthreads();
    stage_rows(row_basis, kRowPitch, kRowFrequencies, a, first_row, rows, first);
    __syncthreads();
    for (int unit = warp; unit < S::kTiles * kUnits; unit += S::kWarps) {
      const int q = unit / kUnits * 16, u = unit % kUnits * (8 * kUnitTiles);
      if (first + u >= a.row_columns) continue;
      float part[1][kUnitTiles][4] = {};
      multiply(
          part, kUnitTiles, kRows / 8,
          [&](int row, int k) { return transformed[k * S::kDeepPitch + q + row]; },
          [&](int k, int column) { return row_basis[k * kRowPitch + u + column]; });
#pragma unroll
      for (int j = 0; j < kUnitTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first + u + 8 * j + column_of(e);
          if (row < a.row_columns)
            share[static_cast<long long>(row) * columns + q + row_of(e)] = part[0][j][e];
        }
      }
    }
  }
}

// Adds the shares of a plane into its first one, in a fixed order, and keeps the band.
__device__ __forceinline__ void select_kernel(const Arguments& a) {
  const int frequencies = a.panel_frequencies;
  const int columns = a.panels * 2 * frequencies, elements = a.row_columns * columns,
            block = blockIdx.x % a.selects;
  const long long plane = blockIdx.x / a.selects;
  float* const shares = a.coefficients + coefficients_of(a, plane, 0, columns);
  float energy = 0.f;
  for (int i = block * kSelectElements + threadIdx.x; i < min(elements, (block + 1) * kSelectElements);
       i += 256) {
    const int row = i / columns, q = i % columns;
    const PackedColumn packed(a, q / (2 * frequencies), q % (2 * frequencies), frequencies);
    float sum = 0.f;
    if (packed.column >= 0) {
      for (int s = 0; s < a.splits; ++s) sum += shares[static_cast<long long>(s) * elements + i];
      sum *= a.band[(row + 1) / 2 * a.column_frequencies + packed.frequency];
    }
    shares[i] = sum;
    energy += sum * sum;
  }
  energy = block_sum(energy, lowpass_shared);
  if (threadIdx.x == 0) a.partials[plane * a.terms + block] = a.inside * a.inside * energy;
}

// spectrum[row][q] (kPitch a row) = sum_u U_H[row][u] C[u][q] of a panel. `area`: shared memory for the
// operands.
template <class S, class Operand>
__device__ __forceinline__ void expand(Operand* spectrum, float* area, const Arguments& a, long long plane,
                                       int panel, int first_row, int rows) {
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * (16 * S::kRowTiles),
            side = warp % 2 * S::kFrequencies;
  const int columns = a.panels * S::kColumns;
  const float* const source = a.coefficients + coefficients_of(a, plane, 0, columns) + panel * S::kColumns;
  float* const row_basis = area;  // [kRows][kSlabPitch]
  Operand* const coefficients =
      reinterpret_cast<Operand*>(area + kRows * kSlabPitch);  // [kChunk][kCoefficientPitch]
  float sum[S::kRowTiles][S::kTiles][4] = {};
  for (int first = 0; first < a.row_columns; first += kChunk) {
    __syncthreads();
    stage_rows(row_basis, kSlabPitch, kChunk, a, first_row, rows, first);
    for (int i = threadIdx.x; i < kChunk * S::kColumns; i += S::kThreads) {
      const int u = i / S::kColumns, q = i % S::kColumns;
      put(coefficients[u * S::kCoefficientPitch + q],
          first + u < a.row_columns ? source[static_cast<long long>(first + u) * columns + q] : 0.f);
    }
    __syncthreads();
    multiply(
        sum, tiles_of<S>(a, panel, warp % 2), min(kChunk / 8, ceil_div(a.row_columns - first, 8)),
        [&](int row, int k) { return row_basis[(warp_row + row) * kSlabPitch + k]; },
        [&](int k, int column) { return coefficients[k * S::kCoefficientPitch + side + column]; });
  }
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        put(spectrum[(warp_row + 16 * i + row_of(e)) * S::kPitch + side + 8 * j + column_of(e)],
            sum[i][j][e]);
    }
  }
  __syncthreads();
}

// kResidual: the mask is not 0 outside the band, so the gradient and the energy need the residual.
template <class S, bool kResidual>
__device__ __forceinline__ void synthesis_kernel(const Arguments& a) {
  constexpr int kTiles = kChunk / 16;  // of 8 columns: a warp has half of a chunk
  const int split_index = blockIdx.x % a.splits;
  const long long plane_index = blockIdx.x / a.splits;
  const int first_row = split_index * kRows, rows = min(kRows, a.height - first_row);
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * (16 * S::kRowTiles),
            warp_column = warp % 2 * (8 * kTiles);
  const Plane plane(a, plane_index);
  const float outside = a.outside * a.outside, projected = a.inside * a.inside - outside;

  using Operand = typename OperandOf<S::kSplit>::Type;
  Operand* const spectrum = reinterpret_cast<Operand*>(lowpass_shared);  // [kRows][kPitch]
  float* const area = lowpass_shared + S::kSpectrum;
  float* const table = area;                         // [kChunk][kPitch]
  float* const direct = table + kChunk * S::kPitch;  // [kRows][kSlabPitch]
  float* const mirror = direct + kRows * kSlabPitch;
  float energy = 0.f;
  const int last = a.width / 2 / kChunk * kChunk, panels = S::kPanels ? a.panels : 1;
  // Downwards: a chunk's mirror side ends with the first column of the chunk above.
  for (int first = last; first >= 0; first -= kChunk) {
    const float carry = threadIdx.x < kRows && first < last ? mirror[threadIdx.x * kSlabPitch] : 0.f;
    const ChunkGroups<S> mine(a, first);
    Group groups[mine.kCount];
    float even[S::kRowTiles][kTiles][4] = {}, odd[S::kRowTiles][kTiles][4] = {};
    const int tiles =
        min(kTiles, ceil_div(a.width / 2 + 1 - first - warp_column, 8));  // 0 or less: beyond the middle
    for (int panel = 0; panel < panels; ++panel) {
      if (panels > 1 || first == last) expand<S>(spectrum, area, a, plane_index, panel, first_row, rows);
      stage_columns<S>(table, a, panel, first);
      if (kResidual && panel == 0) mine.fetch(groups, a, plane, first_row, rows);
      __syncthreads();
      if (tiles <= 0) continue;
      const Operand* const rows_of_warp = spectrum + warp_row * S::kPitch;
      const float* const table_of_warp = table + warp_column * S::kPitch;
      multiply(
          even, tiles, tiles_of<S>(a, panel, 0),
          [&](int row, int k) { return rows_of_warp[row * S::kPitch + k]; },
          [&](int k, int column) { return table_of_warp[column * S::kPitch + k]; });
      multiply(
          odd, tiles, tiles_of<S>(a, panel, 1),
          [&](int row, int k) { return rows_of_warp[row * S::kPitch + S::kFrequencies + k]; },
          [&](int k, int column) { return table_of_warp[column * S::kPitch + S::kFrequencies + k]; });
    }
    float r[mine.kCount][4] = {};
    if (kResidual) {
#pragma unroll
      for (int i = 0; i < mine.kCount; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) r[i][e] = residual(groups[i], a, mine.mask_of(i, rows), e);
      }
    }
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = (warp_row + 16 * i + row_of(e)) * kSlabPitch + warp_column + 8 * j + column_of(e);
          direct[at] = even[i][j][e] + odd[i][j][e];
          mirror[at] = even[i][j][e] - odd[i][j][e];
        }
      }
    }
    if (threadIdx.x < kRows) mirror[threadIdx.x * kSlabPitch + kChunk] = carry;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < mine.kCount; ++i) {
      const unsigned mask = mine.mask_of(i, rows);
      float value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float kept = direct[mine.slab_index(i, e)];
        value[e] = projected * kept;
        if (kResidual) {
          value[e] += outside * r[i][e];
          if (mask >> e & 1u) energy += (r[i][e] - kept) * (r[i][e] - kept);
        }
        value[e] *= plane.scale;
      }
      plane.store_group(value, a, mine.pixel(a, first_row, i), mask);
    }
  }
  if (kResidual) {
    energy = block_sum(energy, lowpass_shared);
    if (threadIdx.x == 0) a.partials[plane_index * a.terms + a.selects + split_index] = outside * energy;
  }
}

// The energy of a sample: the partial ones of its planes' blocks, in a fixed order.
__device__ __forceinline__ void energy_kernel(const Arguments& a) {
  const int sample = blockIdx.x * blockDim.x + threadIdx.x, terms = a.channels * a.terms;
  if (sample >= a.batch) return;
  double sum = 0;
  for (int i = 0; i < terms; ++i) sum += a.partials[static_cast<long long>(sample) * terms + i];
  a.energy[sample] = static_cast<float>(Plane::weight(a, sample) * sum);
}

}  // namespace fastunlearn_lowpass

// `blocks`: so many fit on a multiprocessor, which caps the registers.
#define FASTUNLEARN_KERNEL(name, threads, blocks, ...)          \
  extern "C" __global__ void __launch_bounds__(threads, blocks) \
      name(const fastunlearn_lowpass::Arguments arguments) {    \
    fastunlearn_lowpass::__VA_ARGS__;                           \
  }

FASTUNLEARN_KERNEL(lowpass_plane, 256, 2, plane_kernel(arguments))
FASTUNLEARN_KERNEL(lowpass_analysis_5, 128, 3, analysis_kernel<fastunlearn_lowpass::Narrow>(arguments))
FASTUNLEARN_KERNEL(lowpass_analysis_9, 128, 2, analysis_kernel<fastunlearn_lowpass::Middle>(arguments))
FASTUNLEARN_KERNEL(lowpass_analysis_17, 256, 1, analysis_kernel<fastunlearn_lowpass::Wide>(arguments))
FASTUNLEARN_KERNEL(lowpass_synthesis_5, 128, 3,
                   synthesis_kernel<fastunlearn_lowpass::Narrow, false>(arguments))
FASTUNLEARN_KERNEL(lowpass_synthesis_9, 128, 2,
                   synthesis_kernel<fastunlearn_lowpass::Middle, false>(arguments))
FASTUNLEARN_KERNEL(lowpass_synthesis_17, 256, 1,
                   synthesis_kernel<fastunlearn_lowpass::Wide, false>(arguments))
FASTUNLEARN_KERNEL(lowpass_synthesis_residual_5, 128, 2,
                   synthesis_kernel<fastunlearn_lowpass::Narrow, true>(arguments))
FASTUNLEARN_KERNEL(lowpass_synthesis_residual_9, 128, 2,
                   synthesis_kernel<fastunlearn_lowpass::Middle, true>(arguments))
FASTUNLEARN_KERNEL(lowpass_synthesis_residual_17, 256, 1,
                   synthesis_kernel<fastunlearn_lowpass::Wide, true>(arguments))
FASTUNLEARN_KERNEL(lowpass_select, 256, 4, select_kernel(arguments))
FASTUNLEARN_KERNEL(lowpass_energy, 128, 1, energy_kernel(arguments))
