// Which instruction set runs: the best that the processor has, or a lower one that
// FASTUNLEARN_ISA=portable|avx2|avx512 asks for.
#pragma once
#include <cstdlib>
#include <cstring>

namespace fastunlearn {

enum Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa processor_isa() {
#ifdef FASTUNLEARN_X86
  static const Isa best = __builtin_cpu_supports("x86-64-v4")   ? kAvx512
                          : __builtin_cpu_supports("x86-64-v3") ? kAvx2
                                                                : kPortable;
  return best;
#else
  return kPortable;
#endif
}

inline Isa isa() {
  const char* wanted = std::getenv("FASTUNLEARN_ISA");
  if (wanted == nullptr) return processor_isa();
  const Isa lower = !std::strcmp(wanted, "portable") ? kPortable
                    : !std::strcmp(wanted, "avx2")   ? kAvx2
                                                     : kAvx512;
  return lower < processor_isa() ? lower : processor_isa();
}

}  // namespace fastunlearn

// Declares `void op(const Args&, int64_t begin, int64_t end)` of every instruction set, and `pick_op()`,
// which chooses one.
#ifdef FASTUNLEARN_X86
#define FASTUNLEARN_DISPATCH(op, Args)                                                    \
  namespace fastunlearn {                                                                 \
  namespace portable {                                                                    \
  void op(const Args&, int64_t begin, int64_t end);                                       \
  }                                                                                       \
  namespace avx2 {                                                                        \
  void op(const Args&, int64_t begin, int64_t end);                                       \
  }                                                                                       \
  namespace avx512 {                                                                      \
  void op(const Args&, int64_t begin, int64_t end);                                       \
  }                                                                                       \
  inline auto pick_##op() {                                                               \
    const Isa chosen = isa();                                                             \
    return chosen == kAvx512 ? &avx512::op : chosen == kAvx2 ? &avx2::op : &portable::op; \
  }                                                                                       \
  }
#else
#define FASTUNLEARN_DISPATCH(op, Args)              \
  namespace fastunlearn {                           \
  namespace portable {                              \
  void op(const Args&, int64_t begin, int64_t end); \
  }                                                 \
  inline auto pick_##op() { return &portable::op; } \
  }
#endif
