// Building blocks of the lowpass_residual kernels: groups of four pixels, float32 products on tensor cores,
// sums over a block.
#pragma once

#include "lowpass_residual_plan.h"
#include "tensor_core.cuh"

namespace fastunlearn_lowpass {

extern __shared__ float lowpass_shared[];  // 16-byte aligned

// Four neighbouring pixels of prediction and target as they stand in memory, in flight while the tensor cores
// work on the pixels before them.
struct Group {
  unsigned prediction[4], target[4];
};

__device__ __forceinline__ int bytes_of(int type) { return type == kFloat32 ? 4 : 2; }

__device__ __forceinline__ float decode(const unsigned (&word)[4], int type, int i) {
  if (type == kFloat32) return __uint_as_float(word[i]);
  const unsigned bits = word[i / 2] >> (16 * (i % 2)) & 0xffffu;
  return type == kBFloat16 ? __uint_as_float(bits << 16) : float_of_half(static_cast<unsigned short>(bits));
}

__device__ __forceinline__ unsigned encode_half(float value, int type) {
  if (type == kFloat16) return half_of_float(value);
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
}

// Reads the pixels of the group whose bit in `mask` is set; `vector`: the group is aligned and may be read
// whole.
__device__ __forceinline__ void fetch(unsigned (&word)[4], const char* address, int type, bool vector,
                                      unsigned mask) {
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = 0;
  if (mask == 0) return;
  if (vector && type == kFloat32) {
    load_once(word, address);
  } else if (vector) {
    load_once_half(word, address);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(mask >> i & 1u)) continue;
      if (type == kFloat32) {
        word[i] = reinterpret_cast<const unsigned*>(address)[i];
      } else {
        word[i / 2] |= static_cast<unsigned>(reinterpret_cast<const unsigned short*>(address)[i])
                       << (16 * (i % 2));
      }
    }
  }
}

__device__ __forceinline__ void store(char* address, const float (&value)[4], int type, bool vector,
                                      unsigned mask) {
  if (vector && mask == 15u && type == kFloat32) {
    *reinterpret_cast<float4*>(address) = make_float4(value[0], value[1], value[2], value[3]);
  } else if (vector && mask == 15u) {
    *reinterpret_cast<uint2*>(address) =
        make_uint2(encode_half(value[0], type) | encode_half(value[1], type) << 16,
                   encode_half(value[2], type) | encode_half(value[3], type) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(mask >> i & 1u)) continue;
      if (type == kFloat32) {
        reinterpret_cast<float*>(address)[i] = value[i];
      } else {
        reinterpret_cast<unsigned short*>(address)[i] =
            static_cast<unsigned short>(encode_half(value[i], type));
      }
    }
  }
}

// Where a plane lies in the three image tensors.
struct Plane {
  const char *prediction, *target;
  char* gradient;
  float scale;  // 2 weight

  __device__ __forceinline__ Plane(const Arguments& a, long long plane) {
    const long long sample = plane / a.channels,
                    inside = plane % a.channels * (static_cast<long long>(a.height) * a.width);
    prediction = static_cast<const char*>(a.prediction) +
                 (sample * a.prediction_stride + inside) * bytes_of(a.prediction_type);
    target =
        static_cast<const char*>(a.target) + (sample * a.target_stride + inside) * bytes_of(a.target_type);
    gradient =
        static_cast<char*>(a.gradient) + (sample * a.gradient_stride + inside) * bytes_of(a.prediction_type);
    scale = 2 * weight(a, sample);
  }

  static __device__ __forceinline__ float weight(const Arguments& a, long long sample) {
    return a.weight_is_double ? static_cast<float>(static_cast<const double*>(a.weight)[sample])
                              : static_cast<const float*>(a.weight)[sample];
  }

  __device__ __forceinline__ void fetch_group(Group& group, const Arguments& a, long long pixel,
                                              unsigned mask) const {
    fetch(group.prediction, prediction + pixel * bytes_of(a.prediction_type), a.prediction_type, a.vector,
          mask);
    fetch(group.target, target + pixel * bytes_of(a.target_type), a.target_type, a.vector, mask);
  }

  __device__ __forceinline__ void store_group(const float (&value)[4], const Arguments& a, long long pixel,
                                              unsigned mask) const {
    store(gradient + pixel * bytes_of(a.prediction_type), value, a.prediction_type, a.vector, mask);
  }
};

__device__ __forceinline__ float residual(const Group& group, const Arguments& a, unsigned mask, int i) {
  return mask >> i & 1u
             ? decode(group.prediction, a.prediction_type, i) - decode(group.target, a.target_type, i)
             : 0.f;
}

// x = high + low with 11 significant bits each, all that TF32 keeps; what is lost is at most 2^-22 |x|. The
// tensor core drops the last 13 bits.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high)) + 0x1000u;
}

// An operand in shared memory: a number, or its two halves where it is used often enough to be split only
// once.
__device__ __forceinline__ void put(float& slot, float x) { slot = x; }
__device__ __forceinline__ void put(uint2& slot, float x) { split(x, slot.x, slot.y); }
__device__ __forceinline__ void halves(float x, unsigned& high, unsigned& low) { split(x, high, low); }
__device__ __forceinline__ void halves(uint2 x, unsigned& high, unsigned& low) {
  high = x.x;
  low = x.y;
}

// sum[i][j] += A B for the 16 x 8 tiles i < kRowTiles, j < tiles <= kColumnTiles of a warp, over `steps`
// times eight k, in float32 accuracy: A B = high high + high low + low high + (low low, under 2^-22). `a(row,
// k)` and `b(k, column)` give the operands. The tensor core truncates its sums, so those of one step are
// added to the total by ordinary, rounded additions.
template <int kRowTiles, int kColumnTiles, class A, class B>
__device__ __forceinline__ void multiply(float (&sum)[kRowTiles][kColumnTiles][4], int tiles, int steps,
                                         const A& a, const B& b) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int k = 8 * step + t;
    unsigned high[kRowTiles][4], low[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) halves(a(16 * i + g + 8 * (e % 2), k + 4 * (e / 2)), high[i][e], low[i][e]);
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      if (j >= tiles) break;
      unsigned b_high[2], b_low[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) halves(b(k + 4 * e, 8 * j + g), b_high[e], b_low[e]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        float part[4] = {0.f, 0.f, 0.f, 0.f};
        mma_tf32(part, low[i], b_high);
        mma_tf32(part, high[i], b_low);
        mma_tf32(part, high[i], b_high);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] += part[e];
      }
    }
  }
}

// Row and column, within their 16 x 8 tile, of element e of a lane's sum.
__device__ __forceinline__ int row_of(int e) { return threadIdx.x % 32 / 4 + 8 * (e / 2); }
__device__ __forceinline__ int column_of(int e) { return threadIdx.x % 4 * 2 + e % 2; }

// The sum of `value` over the block, in a fixed order, given to thread 0. `scratch`: a float for each warp,
// not in use.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.f;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += scratch[warp];
  }
  return total;
}

}  // namespace fastunlearn_lowpass
