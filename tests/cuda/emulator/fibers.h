// What emulator.cpp gives to main.cpp.
#pragma once

#include "emulator.h"
#include "lowpass_residual_plan.h"

namespace emulator {

constexpr int kShared = 227 * 1024;  // bytes

enum Order { kForward, kBackward, kShuffled };  // in which the threads of a block run between barriers
using Kernel = void (*)(fastunlearn_lowpass::Arguments);
extern const Kernel kernels[fastunlearn_lowpass::kKernels];

// Runs all blocks of a step of the plan.
void launch(Kernel kernel, const fastunlearn_lowpass::Step& step,
            const fastunlearn_lowpass::Arguments& arguments, Order order);

}  // namespace emulator
