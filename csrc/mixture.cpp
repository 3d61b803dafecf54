// Binding of mixture.
#include "mixture.h"

#include <cmath>

#include "image_binding.h"

FASTUNLEARN_DISPATCH(mixture, MixtureArgs)

namespace fastunlearn {
namespace {

double* checked_weight(const char* name, const Tensor& weight, int64_t batch) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Double && weight.numel() == batch, name,
                  ": expected float64 [", batch, "]");
  check_contiguous(name, weight);
  return weight.mutable_data_ptr<double>();
}

void fill_mixture(const Tensor& retain, const std::optional<Tensor>& retain_index, const Tensor& forget,
                  const std::optional<Tensor>& forget_index, const Tensor& coefficients,
                  const Tensor& from_forget, double lambd, const std::optional<Tensor>& time_log_ratio,
                  const std::optional<Tensor>& noise, const std::optional<Tensor>& counter, int64_t purpose,
                  ScalarType dtype, bool channels_last, Tensor x_t, Tensor retain_target,
                  Tensor forget_target, Tensor retain_weight, Tensor forget_weight) {
  STD_TORCH_CHECK(lambd >= 0 && lambd <= 1, "lambd: expected a number in [0, 1], got ", lambd);
  MixtureArgs args = {};
  args.coefficients = checked_coefficients(coefficients);
  const int64_t batch = coefficients.size(0);
  args.retain = checked_rows("retain", retain, "retain_index", retain_index, batch);
  args.forget = checked_rows("forget", forget, "forget_index", forget_index, batch);
  check_shape("forget", forget, forget.size(0), retain);

  STD_TORCH_CHECK(from_forget.scalar_type() == ScalarType::Bool && from_forget.numel() == batch,
                  "from_forget: expected bool [", batch, "]");
  check_contiguous("from_forget", from_forget);
  args.from_forget = from_forget.const_data_ptr<bool>();
  args.lambd = lambd;
  args.log_odds = std::log(lambd) - std::log1p(-lambd);
  if (time_log_ratio) {
    STD_TORCH_CHECK(time_log_ratio->numel() == batch, "time_log_ratio: expected [", batch, "]");
    check_contiguous("time_log_ratio", *time_log_ratio);
    args.time_log_ratio = time_log_ratio->const_data_ptr();
    args.time_log_ratio_type = float_type("time_log_ratio", *time_log_ratio);
  }

  args.noise = checked_noise(noise, counter, purpose, batch, retain);
  args.extent = extent_of(retain, channels_last);
  const ScalarType target = target_type(dtype);
  args.x_t = checked_output("x_t", x_t, dtype, batch, retain, args.extent);
  args.retain_target = checked_output("retain_target", retain_target, target, batch, retain, args.extent);
  args.forget_target = checked_output("forget_target", forget_target, target, batch, retain, args.extent);
  args.retain_weight = checked_weight("retain_weight", retain_weight, batch);
  args.forget_weight = checked_weight("forget_weight", forget_weight, batch);
  args.in_double = args.retain.type == Type::kDouble || args.forget.type == Type::kDouble ||
                   args.noise.type == Type::kDouble;

  const auto kernel = pick_mixture();
  torch::stable::parallel_for(0, batch, samples_per_thread(args.extent),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("mixture", TORCH_BOX(&fastunlearn::fill_mixture));
}
