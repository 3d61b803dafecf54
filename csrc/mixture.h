// mixture: the SISS mixture sample, both of its targets and the two importance weights, in one pass over two
// images.
//
// With x the image to keep, a the one to forget and p the one that x_t was made from:
//   x_t = alpha p + sigma eps; target of y = a eps + b p + c (p - y), y in {x, a};
//   u = +-rho^2 ||x - a||^2 / 2 - rho <eps, x - a> (+ where p = a), and both weights are sigmoids of u.
// A log ratio of the branches' timestep densities is added to u; an infinite one alone decides.
#pragma once

#include "image_blocks.h"

namespace fastunlearn {

struct MixtureArgs {
  Rows retain, forget;
  const double* coefficients;  // [B, 5]: alpha, sigma, a, b, c
  const bool* from_forget;     // [B]
  double lambd, log_odds;      // log_odds = log(lambd / (1 - lambd))
  const void* time_log_ratio;  // [B]; null: zero
  Type time_log_ratio_type;
  Noise noise;
  Output x_t, retain_target, forget_target;
  double *retain_weight, *forget_weight;  // [B]
  Extent extent;
  bool in_double;  // compute images in double; float otherwise. Sums and weights are double.
};

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

namespace fastunlearn::FASTUNLEARN_ISA {

/// 1 / (1 + exp(-v)), precise where it is tiny, too.
static inline double sigmoid(double v) {
  const double small = __builtin_exp(v < 0 ? v : -v);
  return (v < 0 ? small : 1.0) / (1.0 + small);
}

/// The weights `p(x_t | x) / p_mixture` and `p(x_t | a) / p_mixture` of sample `b`, from u.
static inline void write_weights(const MixtureArgs& args, int64_t b, double u) {
  if (args.lambd == 0.0) {
    args.retain_weight[b] = 1.0;
    args.forget_weight[b] = __builtin_exp(u);
  } else if (args.lambd == 1.0) {
    args.retain_weight[b] = __builtin_exp(-u);
    args.forget_weight[b] = 1.0;
  } else {
    args.retain_weight[b] = sigmoid(-(u + args.log_odds)) / (1.0 - args.lambd);
    args.forget_weight[b] = sigmoid(u + args.log_odds) / args.lambd;
  }
}

/// The weights of sample `b` where one branch cannot have made it: 0, and for the other 1 / its share.
static inline void write_decided_weights(const MixtureArgs& args, int64_t b, bool forget_alone) {
  args.retain_weight[b] = forget_alone ? 0.0 : 1.0 / (1.0 - args.lambd);
  args.forget_weight[b] = forget_alone ? 1.0 / args.lambd : 0.0;
}

template <class Real>
static void mix_images(const MixtureArgs& args, int64_t begin, int64_t end) {
  alignas(64) Real retain_scratch[kScratch], forget_scratch[kScratch], noise_scratch[kScratch];
  const int64_t elements = args.extent.channels * args.extent.pixels;
  for (int64_t b = begin; b < end; ++b) {
    const double* coefficients = args.coefficients + 5 * b;
    const Real alpha = static_cast<Real>(coefficients[0]), sigma = static_cast<Real>(coefficients[1]);
    const Real of_noise = static_cast<Real>(coefficients[2]), of_clean = static_cast<Real>(coefficients[3]);
    const Real of_offset = static_cast<Real>(coefficients[4]);
    const bool from_forget = args.from_forget[b];
    const Output& own_target = from_forget ? args.forget_target : args.retain_target;
    const Output& other_target = from_forget ? args.retain_target : args.forget_target;
    double dot = 0.0, square = 0.0;  // <eps, x - a>, ||x - a||^2
    for_blocks(args.extent, [&](const Block& block) {
      const Real* retain = read_row(args.retain, elements, b, block, retain_scratch);
      const Real* forget = read_row(args.forget, elements, b, block, forget_scratch);
      const Real* noise = read_noise(args.noise, elements, b, block, noise_scratch);
      double block_dot = 0.0, block_square = 0.0;
#pragma omp simd reduction(+ : block_dot, block_square)
      for (int64_t i = 0; i < block.count; ++i) {
        const double difference = static_cast<double>(retain[i]) - static_cast<double>(forget[i]);
        block_dot += static_cast<double>(noise[i]) * difference;
        block_square += difference * difference;
      }
      dot += block_dot;
      square += block_square;

      const Real *own = from_forget ? forget : retain, *other = from_forget ? retain : forget;
      write<Real>(args.x_t, elements, b, block, [=](int64_t i) { return alpha * own[i] + sigma * noise[i]; });
      write<Real>(own_target, elements, b, block,
                  [=](int64_t i) { return of_noise * noise[i] + of_clean * own[i]; });
      write<Real>(other_target, elements, b, block, [=](int64_t i) {
        return of_noise * noise[i] + of_clean * own[i] + of_offset * (own[i] - other[i]);
      });
    });

    const double rho = coefficients[0] / coefficients[1];
    const double u = (from_forget ? 0.5 : -0.5) * rho * rho * square - rho * dot;
    double scratch, ratio = 0.0;
    if (args.time_log_ratio != nullptr)
      ratio = *read(args.time_log_ratio, args.time_log_ratio_type, b, 1, &scratch);
    if (__builtin_isinf(ratio))
      write_decided_weights(args, b, ratio > 0);
    else
      write_weights(args, b, u + ratio);
  }
}

/// Samples [begin, end).
void mixture(const MixtureArgs& args, int64_t begin, int64_t end) {
  args.in_double ? mix_images<double>(args, begin, end) : mix_images<float>(args, begin, end);
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
