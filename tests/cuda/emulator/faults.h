// Kernels that are wrong on purpose: what the emulator has to notice. Each has 64 threads and 64 floats of
// shared memory.
#pragma once

#include <cstdio>
#include <cstring>

#include "fibers.h"

namespace fastunlearn_lowpass {
extern float lowpass_shared[];
}

namespace faults {

using fastunlearn_lowpass::Arguments;
using fastunlearn_lowpass::lowpass_shared;

inline void reads_beyond(Arguments a) { a.energy[0] = a.band[64]; }
inline void writes_an_input(Arguments a) { const_cast<float*>(a.band)[0] = 1; }
inline void writes_beyond_shared(Arguments) { lowpass_shared[64] = 1; }

inline void loads_misaligned(Arguments a) {
  unsigned word[4];
  fastunlearn_lowpass::load_once(word, a.band + 1);
}

inline void splits_a_barrier(Arguments) {
  if (threadIdx.x < 32) __syncthreads();
}

inline void reads_unwritten_shared(Arguments a) {
  if (threadIdx.x == 0) a.energy[0] = lowpass_shared[1];
}

inline void forgets_a_barrier(Arguments a) {
  lowpass_shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) a.energy[0] = lowpass_shared[63];
}

struct Fault {
  const char* name;
  emulator::Kernel kernel;
};
constexpr Fault kFaults[] = {
    {"reads_beyond", reads_beyond},
    {"writes_an_input", writes_an_input},
    {"writes_beyond_shared", writes_beyond_shared},
    {"loads_misaligned", loads_misaligned},
    {"splits_a_barrier", splits_a_barrier},
    {"reads_unwritten_shared", reads_unwritten_shared},
    {"forgets_a_barrier", forgets_a_barrier},
};

// Runs it with `arguments`, whose band has 64 floats, and prints energy[0].
inline bool run(const char* name, const Arguments& arguments, emulator::Order order) {
  for (const Fault& fault : kFaults) {
    if (std::strcmp(fault.name, name) != 0) continue;
    emulator::launch(fault.kernel, {0, 64, 64 * 4, 1}, arguments, order);
    std::printf("%g\n", arguments.energy[0]);
    return true;
  }
  return false;
}

}  // namespace faults
