// The products behind sqdist: tile[i][lane] = <row i, query of the lane> over one chunk of columns, for a
// group of kRows rows (less 128) and a panel of kLanes queries, both padded with zeros to `width` columns, a
// multiple of 16. vpdpbusd adds four products to an int32; vpmaddubsw, which older processors have, would
// saturate an int16 with two.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace fastunlearn {

constexpr int64_t kRows = 24, kLanes = 16;  // 24 vectors of 16 sums

#ifdef FASTUNLEARN_ISA
namespace FASTUNLEARN_ISA {
namespace {

// Without VNNI: group int16 [kRows][width], panel int16 [kLanes][width]. The inner loop becomes pmaddwd or
// smlal.
void products_int16(const void* group, const void* panel, int64_t width, int32_t* tile) {
  for (int64_t lane = 0; lane < kLanes; lane += 4) {
    const int16_t* q0 = static_cast<const int16_t*>(panel) + lane * width;
    const int16_t *q1 = q0 + width, *q2 = q1 + width, *q3 = q2 + width;
    for (int64_t i = 0; i < kRows; ++i) {
      const int16_t* row = static_cast<const int16_t*>(group) + i * width;
      int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (int64_t j = 0; j < width; ++j) {
        s0 += row[j] * q0[j];
        s1 += row[j] * q1[j];
        s2 += row[j] * q2[j];
        s3 += row[j] * q3[j];
      }
      int32_t* out = tile + i * kLanes + lane;
      out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
    }
  }
}

// With VNNI: group s8 [width / 4][kRows][4], panel u8 [width / 4][kLanes][4]. Four columns of a row go to all
// lanes.
#if defined(__AVX512F__)
__attribute__((target("avx512vnni"))) void products_vnni(const void* group, const void* panel, int64_t width,
                                                         int32_t* tile) {
  const int8_t* rows = static_cast<const int8_t*>(group);
  const uint8_t* lanes = static_cast<const uint8_t*>(panel);
  __m512i sum[kRows];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t j = 0; j < width; j += 4, rows += 4 * kRows, lanes += 4 * kLanes) {
    const __m512i queries = _mm512_load_si512(lanes);
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i)
      // The broadcast is in the instruction, which gcc does not write: on Zen 5 2.4 times as fast as from a
      // register.
      asm("vpdpbusd %[row]%{1to16%}, %[queries], %[sum]"
          : [sum] "+v"(sum[i])
          : [queries] "v"(queries), [row] "m"(*reinterpret_cast<const int8_t(*)[4]>(rows + 4 * i)));
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) _mm512_store_si512(tile + i * kLanes, sum[i]);
}
#elif defined(__AVX2__)
__attribute__((target("avxvnni"))) void products_vnni(const void* group, const void* panel, int64_t width,
                                                      int32_t* tile) {
  constexpr int kPart = 6;  // 6 x 2 sums, 2 vectors of queries and 1 of a row: 15 of 16 registers
  for (int64_t first = 0; first < kRows; first += kPart) {
    const int8_t* rows = static_cast<const int8_t*>(group) + 4 * first;
    const __m256i* lanes = static_cast<const __m256i*>(panel);
    __m256i sum[kPart][2];
#pragma GCC unroll 6
    for (int i = 0; i < kPart; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (int64_t j = 0; j < width; j += 4, rows += 4 * kRows, lanes += 2) {
      const __m256i left = _mm256_load_si256(lanes), right = _mm256_load_si256(lanes + 1);
#pragma GCC unroll 6
      for (int i = 0; i < kPart; ++i) {
        int32_t four;
        std::memcpy(&four, rows + 4 * i, 4);
        const __m256i row = _mm256_set1_epi32(four);
        sum[i][0] = _mm256_dpbusd_avx_epi32(sum[i][0], left, row);
        sum[i][1] = _mm256_dpbusd_avx_epi32(sum[i][1], right, row);
      }
    }
    __m256i* out = reinterpret_cast<__m256i*>(tile + first * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kPart; ++i, out += 2) {
      _mm256_store_si256(out, sum[i][0]);
      _mm256_store_si256(out + 1, sum[i][1]);
    }
  }
}
#else
constexpr auto products_vnni = products_int16;  // never asked for: the binding finds no VNNI
#endif

}  // namespace
}  // namespace FASTUNLEARN_ISA
#endif
}  // namespace fastunlearn
