// The few machine instructions that CUDA C++ has no words for, without any header, so that nvcc and NVRTC
// both take them. Where FASTUNLEARN_EMULATOR names a header, that one stands in for them
// (tests/cuda/emulator: the kernels run on a CPU).
#pragma once

#ifdef FASTUNLEARN_EMULATOR
#include FASTUNLEARN_EMULATOR
#else

namespace fastunlearn_lowpass {

// D += A B on tensor cores: A 16 x 8, B 8 x 8 in TF32, D 16 x 8 in float32 (PTX ISA, "Matrix fragments for
// mma.m16n8k8"). With g = lane / 4 and t = lane % 4: a = A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4];
// b = B[t][g], B[t + 4][g]; d = D[g][2 t], D[g][2 t + 1], D[g + 8][2 t], D[g + 8][2 t + 1].
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Images are read once: 16 or 8 bytes that leave the tables in the L1 cache.
__device__ __forceinline__ void load_once(unsigned (&word)[4], const void* address) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "l"(address));
}

__device__ __forceinline__ void load_once_half(unsigned (&word)[4], const void* address) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(word[0]), "=r"(word[1])
               : "l"(address));
}

__device__ __forceinline__ float float_of_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ unsigned short half_of_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace fastunlearn_lowpass

#endif
