// What csrc/lowpass_residual.cu gives to the binding.
#pragma once

#include "lowpass_residual_plan.h"

// Enqueues the steps of `plan` on a CUDA stream. Returns null, or what went wrong.
extern "C" const char* fastunlearn_lowpass_launch(const fastunlearn_lowpass::Plan* plan,
                                                  fastunlearn_lowpass::Arguments* arguments, void* stream);
