// noising: x_t = alpha x_0 + sigma eps, and the target a eps + b x_0.
#pragma once

#include "image_blocks.h"

namespace fastunlearn {

struct NoisingArgs {
  Rows images;
  const double* coefficients;  // [B, 5]: alpha, sigma, a, b, c
  Noise noise;
  Output x_t;
  Output target;  // without data: not wanted
  Extent extent;
  bool in_double;  // compute in double; float otherwise
};

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {

template <class Real>
static void noise_images(const NoisingArgs& args, int64_t begin, int64_t end) {
  alignas(64) Real clean_scratch[kScratch], noise_scratch[kScratch];
  const int64_t elements = args.extent.channels * args.extent.pixels;
  for (int64_t b = begin; b < end; ++b) {
    const double* coefficients = args.coefficients + 5 * b;
    const Real alpha = static_cast<Real>(coefficients[0]), sigma = static_cast<Real>(coefficients[1]);
    const Real of_noise = static_cast<Real>(coefficients[2]), of_clean = static_cast<Real>(coefficients[3]);
    for_blocks(args.extent, [&](const Block& block) {
      const Real* clean = read_row(args.images, elements, b, block, clean_scratch);
      const Real* noise = read_noise(args.noise, elements, b, block, noise_scratch);
      write<Real>(args.x_t, elements, b, block,
                  [=](int64_t i) { return alpha * clean[i] + sigma * noise[i]; });
      if (args.target.data != nullptr)
        write<Real>(args.target, elements, b, block,
                    [=](int64_t i) { return of_noise * noise[i] + of_clean * clean[i]; });
    });
  }
}

/// Samples [begin, end).
void noising(const NoisingArgs& args, int64_t begin, int64_t end) {
  args.in_double ? noise_images<double>(args, begin, end) : noise_images<float>(args, begin, end);
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
