// Planes that fit in shared memory (up to 64 x 64 and a little beyond): one launch, one read and one write of
// the images for every mask. A block has one plane, or all planes of a sample, whose energy it then writes
// itself.
#pragma once

#include "lowpass_residual_blocks.cuh"

namespace fastunlearn_lowpass {

// put(item, row, column, sum_k a(item, row, k) b(item, k, column)) for `items` products of size rows x depth
// x columns, shared among the warps. On tensor cores; for the gradient.
template <class A, class B, class Put>
__device__ __forceinline__ void tensor_products(int items, int rows, int columns, int depth, const A& a,
                                                const B& b, const Put& put) {
  const int row_tiles = ceil_div(rows, 16), column_tiles = ceil_div(columns, 16);
  for (int unit = threadIdx.x / 32; unit < items * row_tiles * column_tiles; unit += kPlaneThreads / 32) {
    const int item = unit / (row_tiles * column_tiles);
    const int first_row = unit / column_tiles % row_tiles * 16, first_column = unit % column_tiles * 16;
    float sum[1][2][4] = {};
    multiply(
        sum, 2, ceil_div(depth, 8),
        [&](int row, int k) {
          return first_row + row < rows && k < depth ? a(item, first_row + row, k) : 0.f;
        },
        [&](int k, int column) {
          return first_column + column < columns && k < depth ? b(item, k, first_column + column) : 0.f;
        });
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + row_of(e), column = first_column + 8 * j + column_of(e);
        if (row < rows && column < columns) put(item, row, column, sum[0][j][e]);
      }
    }
  }
}

// The same by fused multiply-adds, kTile x kTile sums a thread. For the coefficients: tensor cores truncate,
// which makes every product a little smaller, and in a sum of squares that does not average out.
template <int kTile, class A, class B, class Put>
__device__ __forceinline__ void tiled_products(int items, int rows, int columns, int depth, const A& a,
                                               const B& b, const Put& put) {
  const int row_step = ceil_div(rows, kTile), column_step = ceil_div(columns, kTile);
  for (int unit = threadIdx.x; unit < items * row_step * column_step; unit += kPlaneThreads) {
    const int item = unit / (row_step * column_step), first_row = unit / column_step % row_step,
              first_column = unit % column_step;
    float sum[kTile][kTile] = {};
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      float left[kTile], right[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) left[i] = a(item, min(first_row + i * row_step, rows - 1), k);
#pragma unroll
      for (int j = 0; j < kTile; ++j) right[j] = b(item, k, min(first_column + j * column_step, columns - 1));
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) sum[i][j] += left[i] * right[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int row = first_row + i * row_step, column = first_column + j * column_step;
        if (row < rows && column < columns) put(item, row, column, sum[i][j]);
      }
    }
  }
}

template <class A, class B, class Put>
__device__ __forceinline__ void exact_products(int items, int rows, int columns, int depth, const A& a,
                                               const B& b, const Put& put) {
  if (items * rows * columns >= 16 * kPlaneThreads / 2) {
    tiled_products<4>(items, rows, columns, depth, a, b, put);
  } else {
    tiled_products<2>(items, rows, columns, depth, a, b, put);
  }
}

__device__ __forceinline__ void plane_kernel(const Arguments& a) {
  const int planes = a.planes_per_block, lines = planes * a.height, groups = ceil_div(a.width, 4);
  const int rows = a.row_columns, columns = a.column_columns;
  const int image_pitch = plane_pitch(a.width), row_pitch = plane_pitch(rows), pitch = plane_pitch(columns);
  const long long first = static_cast<long long>(blockIdx.x) * planes;

  float* const column_basis = lowpass_shared;               // [width][pitch]
  float* const row_basis = column_basis + a.width * pitch;  // [height][row_pitch]
  float* const image =
      row_basis + a.height * row_pitch;  // [lines][image_pitch]: the residual, then the gradient
  float* const spectrum = image + lines * image_pitch;       // [planes][rows][pitch]
  float* const half_way = spectrum + planes * rows * pitch;  // [lines][pitch]: one axis transformed
  float* const scratch = half_way + lines * pitch;
  const auto column_at = [&](int line, int column) { return column_basis[line * pitch + column]; };
  const auto row_at = [&](int line, int column) { return row_basis[line * row_pitch + column]; };

  for (int i = threadIdx.x; i < a.width * columns; i += kPlaneThreads)
    column_basis[i / columns * pitch + i % columns] = a.column_basis[i];
  for (int i = threadIdx.x; i < a.height * rows; i += kPlaneThreads)
    row_basis[i / rows * row_pitch + i % rows] = a.row_basis[i];
  for (int i = threadIdx.x; i < lines * groups; i += kPlaneThreads) {
    const int line = i / groups, column = i % groups * 4, left = a.width - column;
    const unsigned mask = left < 4 ? (1u << left) - 1u : 15u;
    Group group;
    Plane(a, first + line / a.height)
        .fetch_group(group, a, static_cast<long long>(line % a.height) * a.width + column, mask);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < left) image[line * image_pitch + column + e] = residual(group, a, mask, e);
    }
  }
  __syncthreads();

  exact_products(
      1, lines, columns, a.width, [&](int, int line, int k) { return image[line * image_pitch + k]; },
      [&](int, int k, int column) { return column_at(k, column); },
      [&](int, int line, int column, float value) { half_way[line * pitch + column] = value; });
  __syncthreads();

  float energy = 0.f;
  exact_products(
      planes, rows, columns, a.height, [&](int, int row, int k) { return row_at(k, row); },
      [&](int plane, int k, int column) { return half_way[(plane * a.height + k) * pitch + column]; },
      [&](int plane, int row, int column, float value) {
        const float kept = a.band[(row + 1) / 2 * a.column_frequencies + (column + 1) / 2] * value;
        spectrum[(plane * rows + row) * pitch + column] = kept;
        energy += a.inside * a.inside * kept * kept;
      });
  __syncthreads();

  tensor_products(
      planes, a.height, columns, rows, [&](int, int line, int k) { return row_at(line, k); },
      [&](int plane, int k, int column) { return spectrum[(plane * rows + k) * pitch + column]; },
      [&](int plane, int line, int column, float value) {
        half_way[(plane * a.height + line) * pitch + column] = value;
      });
  __syncthreads();

  const float outside = a.outside * a.outside, projected = a.inside * a.inside - outside;
  tensor_products(
      1, lines, a.width, columns, [&](int, int line, int k) { return half_way[line * pitch + k]; },
      [&](int, int k, int column) { return column_at(column, k); },
      [&](int, int line, int column, float value) {
        float& pixel = image[line * image_pitch + column];
        energy += outside * (pixel - value) * (pixel - value);
        pixel = projected * value + outside * pixel;
      });
  const float total = block_sum(energy, scratch);  // and a barrier
  if (threadIdx.x == 0) {
    if (a.terms == 0) {
      a.energy[blockIdx.x] = Plane::weight(a, blockIdx.x) * total;
    } else {
      a.partials[blockIdx.x] = total;
    }
  }

  for (int i = threadIdx.x; i < lines * groups; i += kPlaneThreads) {
    const int line = i / groups, column = i % groups * 4, left = a.width - column;
    const Plane plane(a, first + line / a.height);
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      value[e] = e < left ? plane.scale * image[line * image_pitch + column + e] : 0.f;
    plane.store_group(value, a, static_cast<long long>(line % a.height) * a.width + column,
                      left < 4 ? (1u << left) - 1u : 15u);
  }
}

}  // namespace fastunlearn_lowpass
