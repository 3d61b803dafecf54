// Stored numbers (uint8, float16, bfloat16, float32, float64) to and from float and double, without torch.
//
// Every conversion is straight-line code on one element, which the compiler vectorises in a loop; none needs
// hardware support for 16-bit floats, and none makes a subnormal float32 on its way: flush-to-zero modes
// change nothing.
#pragma once

#include <cstdint>

namespace fastunlearn {

/// What a pointer points to, numbered as torch's ScalarType.
enum class Type : int8_t { kUint8 = 0, kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15 };

constexpr int64_t size_of(Type type) {
  return type == Type::kUint8 ? 1 : type == Type::kFloat ? 4 : type == Type::kDouble ? 8 : 2;
}

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {

#define FASTUNLEARN_INLINE static inline __attribute__((always_inline))

template <class To, class From>
FASTUNLEARN_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

/// `condition ? yes : no` without a branch, which would stop the vectoriser.
FASTUNLEARN_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

FASTUNLEARN_INLINE float to_float(Half half) {
  const uint32_t bits = half.bits, magnitude = bits & 0x7FFFu;
  const uint32_t rebias =
      select(magnitude >= 0x7C00u, 224u << 23, 112u << 23);  // largest exponent: infinities, NaN
  const uint32_t subnormal =
      same_bits<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return same_bits<float>(select(magnitude < 0x0400u, subnormal, (magnitude << 13) + rebias) |
                          (bits & 0x8000u) << 16);
}

FASTUNLEARN_INLINE float to_float(BFloat16 value) {
  return same_bits<float>(static_cast<uint32_t>(value.bits) << 16);
}

/// Rounds to nearest, ties to even; overflows to infinity.
FASTUNLEARN_INLINE Half to_half(float value) {
  const uint32_t bits = same_bits<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: half's subnormal step is the last place of 0.5, where the addition rounds.
  const uint32_t subnormal = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t special = select(magnitude > 0x7F800000u, 0x7E00u, 0x7C00u);
  const uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);
  const uint32_t rounded = select(magnitude >= 0x47800000u, special, finite);
  return {static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000u))};
}

/// Rounds to nearest, ties to even.
FASTUNLEARN_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = same_bits<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(select((bits & 0x7FFFFFFFu) > 0x7F800000u, 0x7FC0u, rounded))};
}

/// A stored number as the network sees it, as `Real` (float or double): uint8 `u` is the float32 `u / 127.5 -
/// 1`.
template <class Real>
FASTUNLEARN_INLINE Real value(uint8_t stored) {
  // The quotient correctly rounded (for all 256), without a division: the first product is exact, the second
  // tiny.
  constexpr float high = 0x1.01p-7f, low = static_cast<float>(1 / 127.5 - 0x1.01p-7);
  const float u = static_cast<float>(static_cast<int32_t>(stored));
  return static_cast<Real>((u * high + u * low) - 1.0f);
}

template <class Real>
FASTUNLEARN_INLINE Real value(Half stored) {
  return static_cast<Real>(to_float(stored));
}

template <class Real>
FASTUNLEARN_INLINE Real value(BFloat16 stored) {
  return static_cast<Real>(to_float(stored));
}

template <class Real>
FASTUNLEARN_INLINE Real value(float stored) {
  return static_cast<Real>(stored);
}

template <class Real>
FASTUNLEARN_INLINE Real value(double stored) {
  return static_cast<Real>(stored);
}

FASTUNLEARN_INLINE void assign(Half& stored, double value) { stored = to_half(static_cast<float>(value)); }
FASTUNLEARN_INLINE void assign(Half& stored, float value) { stored = to_half(value); }
FASTUNLEARN_INLINE void assign(BFloat16& stored, double value) {
  stored = to_bfloat16(static_cast<float>(value));
}
FASTUNLEARN_INLINE void assign(BFloat16& stored, float value) { stored = to_bfloat16(value); }
FASTUNLEARN_INLINE void assign(float& stored, double value) { stored = static_cast<float>(value); }
FASTUNLEARN_INLINE void assign(float& stored, float value) { stored = value; }
FASTUNLEARN_INLINE void assign(double& stored, double value) { stored = value; }
FASTUNLEARN_INLINE void assign(double& stored, float value) { stored = static_cast<double>(value); }

/// Calls `run(T*)` with a null pointer of the C++ type that `type` names, which must be a float type.
template <class Run>
FASTUNLEARN_INLINE void with_float_type(Type type, Run run) {
  if (type == Type::kHalf) run(static_cast<Half*>(nullptr));
  if (type == Type::kBFloat16) run(static_cast<BFloat16*>(nullptr));
  if (type == Type::kFloat) run(static_cast<float*>(nullptr));
  if (type == Type::kDouble) run(static_cast<double*>(nullptr));
}

/// The same for rows of images, which may be uint8 too.
template <class Run>
FASTUNLEARN_INLINE void with_row_type(Type type, Run run) {
  if (type == Type::kUint8) run(static_cast<uint8_t*>(nullptr));
  with_float_type(type, run);
}

/// `count` stored numbers as `Real`.
template <class Real, class Stored>
static inline void load(const Stored* stored, int64_t count, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = value<Real>(stored[i]);
}

/// `count` numbers, rounded to `type`, to the elements 0, stride, 2 stride, ... of `stored`.
template <class Real>
static inline void store(const Real* values, int64_t count, Type type, void* stored, int64_t start,
                         int64_t stride) {
  with_float_type(type, [&](auto* tag) {
    auto* out = static_cast<decltype(tag)>(stored) + start;
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) assign(out[i], values[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) assign(out[i * stride], values[i]);
    }
  });
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
