// What the streamed kernels of lowpass_residual.cuh move between global and shared memory: chunks of image
// columns with their mirror images, and parts of the two bases.
#pragma once

#include "lowpass_residual_blocks.cuh"

namespace fastunlearn_lowpass {

// Packed column q of a panel: first kFrequencies cosines, from frequency 0 on, then as many sines, from
// frequency 1 on.
struct PackedColumn {
  int frequency, column;  // column of the basis, or -1: none

  __device__ __forceinline__ PackedColumn(const Arguments& a, int panel, int q, int frequencies) {
    const int sine = q >= frequencies;
    frequency = panel * frequencies + q - sine * (frequencies - 1);
    column = frequency == 0 ? 0 : 2 * frequency - 1 + sine;
    if (column >= a.column_columns) column = -1;
  }
};

// Eights of cosines or sines in a panel.
template <class S>
__device__ __forceinline__ int tiles_of(const Arguments& a, int panel, int sine) {
  return min(S::kTiles, max(0, ceil_div(a.column_frequencies - sine - panel * S::kFrequencies, 8)));
}

// A chunk of a block: columns [first, first + kChunk) as they are, and their mirror images, columns (W -
// first - kChunk, W - first]. Every column c belongs to one side: 2 c <= W is direct. Groups of four aligned
// columns: the mirror images of first + 1 ... first + kChunk, so slab column 0 of the mirror side comes from
// the neighbouring chunk. A thread has the same four columns of every kRowStep-th row.
template <class S>
struct ChunkGroups {
  static constexpr int kSide = kChunk / 4, kRowStep = S::kThreads / (2 * kSide), kCount = kRows / kRowStep;
  int first_row, column;  // within the block; within the image
  bool mirrored;
  unsigned mask;  // of the pixels on this side

  __device__ __forceinline__ ChunkGroups(const Arguments& a, int first) {
    first_row = threadIdx.x / (2 * kSide);
    mirrored = threadIdx.x % (2 * kSide) >= kSide;
    const int offset = threadIdx.x % kSide * 4;
    column = mirrored ? a.width - first - kChunk + offset : first + offset;
    mask = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = column + e;
      if (mirrored ? 2 * c > a.width && c < a.width : 2 * c <= a.width) mask |= 1u << e;
    }
  }

  __device__ __forceinline__ unsigned mask_of(int i, int rows) const {
    return first_row + i * kRowStep < rows ? mask : 0u;
  }

  __device__ __forceinline__ long long pixel(const Arguments& a, int block_row, int i) const {
    return static_cast<long long>(block_row + first_row + i * kRowStep) * a.width + column;
  }

  // The pixel's place in the direct or the mirror slab, which follows it.
  __device__ __forceinline__ int slab_index(int i, int e) const {
    const int offset = threadIdx.x % kSide * 4 + e;
    return (first_row + i * kRowStep + (mirrored ? kRows : 0)) * kSlabPitch +
           (mirrored ? kChunk - offset : offset);
  }

  __device__ __forceinline__ void fetch(Group (&groups)[kCount], const Arguments& a, const Plane& plane,
                                        int block_row, int rows) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      plane.fetch_group(groups[i], a, pixel(a, block_row, i), mask_of(i, rows));
  }
};

// table[m][q] (q < kColumns, kPitch a row): packed column q of the column basis at image column first + m, 0
// beyond the middle.
template <class S, class Slot>
__device__ __forceinline__ void stage_columns(Slot* table, const Arguments& a, int panel, int first) {
  for (int q = threadIdx.x; q < S::kColumns; q += S::kThreads) {
    const PackedColumn packed(a, panel, q, S::kFrequencies);
    const float* source = a.column_basis + static_cast<long long>(first) * a.column_columns + packed.column;
#pragma unroll 8
    for (int m = 0; m < kChunk; ++m) {
      const bool present = packed.column >= 0 && 2 * (first + m) <= a.width;
      put(table[m * S::kPitch + q], present ? source[m * a.column_columns] : 0.f);
    }
  }
}

// slab[row][u] (`count` columns, `pitch` a row): the row basis at the block's rows, columns first + u.
template <class Slot>
__device__ __forceinline__ void stage_rows(Slot* slab, int pitch, int count, const Arguments& a,
                                           int first_row, int rows, int first) {
  for (int i = threadIdx.x; i < kRows * count; i += blockDim.x) {
    const int row = i / count, u = first + i % count;
    const bool present = row < rows && u < a.row_columns;
    put(slab[row * pitch + i % count],
        present ? a.row_basis[static_cast<long long>(first_row + row) * a.row_columns + u] : 0.f);
  }
}

}  // namespace fastunlearn_lowpass
