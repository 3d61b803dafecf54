// Launches the kernels of csrc/lowpass_residual.cuh in the order of the plan. No torch here: the binding is
// lowpass_residual_cuda.cpp.
#include <cuda_runtime.h>

#include <climits>

#include "lowpass_residual.cuh"
#include "lowpass_residual_launch.h"

namespace {

using fastunlearn_lowpass::Arguments;

// In the order of fastunlearn_lowpass::Kernel.
using Function = void (*)(Arguments);
const Function kKernels[] = {
    lowpass_plane,
    lowpass_analysis_5,
    lowpass_analysis_9,
    lowpass_analysis_17,
    lowpass_synthesis_5,
    lowpass_synthesis_9,
    lowpass_synthesis_17,
    lowpass_synthesis_residual_5,
    lowpass_synthesis_residual_9,
    lowpass_synthesis_residual_17,
    lowpass_select,
    lowpass_energy,
};
static_assert(sizeof(kKernels) / sizeof(kKernels[0]) == fastunlearn_lowpass::kKernels,
              "one entry for each kernel");

cudaError_t launch(const fastunlearn_lowpass::Step& step, Arguments& arguments, cudaStream_t stream) {
  constexpr int kDefaultShared = 48 * 1024;  // bytes; more has to be asked for
  if (step.blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const void* kernel = reinterpret_cast<const void*>(kKernels[step.kernel]);
  if (step.shared > kDefaultShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, step.shared);
    if (error != cudaSuccess) return error;
  }
  void* parameters[] = {&arguments};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(step.blocks)), dim3(step.threads), parameters,
                          step.shared, stream);
}

}  // namespace

extern "C" const char* fastunlearn_lowpass_launch(const fastunlearn_lowpass::Plan* plan, Arguments* arguments,
                                                  void* stream) {
  for (int i = 0; i < plan->count; ++i) {
    const cudaError_t error = launch(plan->steps[i], *arguments, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here, not by whoever asks next
      return cudaGetErrorString(error);
    }
  }
  return nullptr;
}
