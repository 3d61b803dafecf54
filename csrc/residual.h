// residual on a CPU: the weighted squared error of every sample and its gradient, in one pass.
#pragma once

#include <type_traits>

#include "numeric.h"

namespace fastunlearn {

/// A sample is `elements` numbers without gaps, in the same order in all three tensors; samples are a stride
/// apart.
struct ResidualArgs {
  const void *prediction, *target;
  void* gradient;  // of the type of prediction
  Type prediction_type, target_type;
  int64_t prediction_stride, target_stride, gradient_stride;
  int64_t elements;
  const double* weight;  // [B]
  void* loss;            // [B] float, or double where prediction is
};

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {

/// Writes 2 weight (prediction - target); returns ||prediction - target||^2, summed as `Real` in blocks, then
/// double.
template <class Real, class Prediction, class Target>
static double residual_sample(const Prediction* __restrict__ prediction, const Target* __restrict__ target,
                              int64_t elements, Real twice_weight, Prediction* __restrict__ gradient) {
  constexpr int64_t block = 1024;  // longer sums of float32 squares would err more than torch's
  double total = 0.0;
  for (int64_t start = 0; start < elements; start += block) {
    const int64_t end = elements - start < block ? elements : start + block;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) {
      const Real difference = value<Real>(prediction[i]) - value<Real>(target[i]);
      sum += difference * difference;
      assign(gradient[i], twice_weight * difference);
    }
    total += sum;
  }
  return total;
}

template <class Prediction, class Target>
static void residual_samples(const ResidualArgs& args, int64_t begin, int64_t end) {
  constexpr bool in_double = std::is_same_v<Prediction, double> || std::is_same_v<Target, double>;
  using Real = std::conditional_t<in_double, double, float>;
  using Loss = std::conditional_t<std::is_same_v<Prediction, double>, double, float>;
  for (int64_t sample = begin; sample < end; ++sample) {
    const auto* prediction =
        static_cast<const Prediction*>(args.prediction) + sample * args.prediction_stride;
    const auto* target = static_cast<const Target*>(args.target) + sample * args.target_stride;
    auto* gradient = static_cast<Prediction*>(args.gradient) + sample * args.gradient_stride;
    const double weight = args.weight[sample];
    const double energy =
        residual_sample<Real>(prediction, target, args.elements, static_cast<Real>(2.0 * weight), gradient);
    static_cast<Loss*>(args.loss)[sample] = static_cast<Loss>(weight * energy);
  }
}

/// Samples [begin, end).
void residual(const ResidualArgs& args, int64_t begin, int64_t end) {
  with_float_type(args.prediction_type, [&](auto* prediction) {
    with_float_type(args.target_type, [&](auto* target) {
      using Prediction = std::remove_pointer_t<decltype(prediction)>;
      residual_samples<Prediction, std::remove_pointer_t<decltype(target)>>(args, begin, end);
    });
  });
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
