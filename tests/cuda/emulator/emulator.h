// CUDA on one CPU thread, so that the kernels run and are checked where there is no GPU. Every CUDA thread of
// a block is a fiber; blocks run one after the other. A fiber runs until it has to wait for its warp
// (shuffle, tensor core) or its block (__syncthreads). It finds: wrong numbers, reads of shared memory that
// nothing wrote (it starts as NaN), missing barriers (fibers run in several orders), barriers that not all
// threads reach. Accesses outside a tensor: the tensors lie between pages that cannot be touched (main.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulator::thread->index)

struct Index {
  unsigned x;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
using std::max;
using std::min;

namespace emulator {

struct Thread {
  Index index;
};
extern Thread* thread;  // the running one

void wait_for_block();
void tensor_core(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
float shuffle_xor(float value, int mask);

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline void check_aligned(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) __builtin_trap();  // as a GPU would
}

}  // namespace emulator

extern Index blockIdx, blockDim;

inline void __syncthreads() { emulator::wait_for_block(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return emulator::shuffle_xor(value, mask); }
inline unsigned __float_as_uint(float value) { return emulator::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return emulator::bits<float>(value); }

namespace fastunlearn_lowpass {

inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::tensor_core(d, a, b);
}

inline void load_once(unsigned (&word)[4], const void* address) {
  emulator::check_aligned(address, 16);
  std::memcpy(word, address, 16);
}

inline void load_once_half(unsigned (&word)[4], const void* address) {
  emulator::check_aligned(address, 8);
  std::memcpy(word, address, 8);
}

inline float float_of_half(unsigned short value) { return emulator::bits<_Float16>(value); }
inline unsigned short half_of_float(float value) {
  return emulator::bits<unsigned short>(static_cast<_Float16>(value));
}

}  // namespace fastunlearn_lowpass
