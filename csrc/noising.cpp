// Binding of noising.
#include "noising.h"

#include "image_binding.h"

FASTUNLEARN_DISPATCH(noising, NoisingArgs)

namespace fastunlearn {
namespace {

void fill_noising(const Tensor& images, const std::optional<Tensor>& index, const Tensor& coefficients,
                  const std::optional<Tensor>& noise, const std::optional<Tensor>& counter, int64_t purpose,
                  bool with_target, ScalarType dtype, bool channels_last, Tensor x_t, Tensor target) {
  const double* coefficient = checked_coefficients(coefficients);
  const int64_t batch = coefficients.size(0);
  NoisingArgs args = {};
  args.images = checked_rows("images", images, "index", index, batch);
  args.coefficients = coefficient;
  args.noise = checked_noise(noise, counter, purpose, batch, images);
  args.extent = extent_of(images, channels_last);
  args.x_t = checked_output("x_t", x_t, dtype, batch, images, args.extent);
  if (with_target)
    args.target = checked_output("target", target, target_type(dtype), batch, images, args.extent);
  args.in_double = args.images.type == Type::kDouble || args.noise.type == Type::kDouble;

  const auto kernel = pick_noising();
  torch::stable::parallel_for(0, batch, samples_per_thread(args.extent),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("noising", TORCH_BOX(&fastunlearn::fill_noising));
}
