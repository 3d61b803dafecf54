// Binding of csrc/lowpass_residual.cu: argument checks, scratch memory, torch's current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"
#include "lowpass_residual_launch.h"

namespace fastunlearn {
namespace {

using namespace fastunlearn_lowpass;

int type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

void check_images(const char* name, const Tensor& images, const Tensor& like) {
  STD_TORCH_CHECK(images.dim() == 4, name, ": expected 4 dimensions, got ", images.dim());
  int64_t expected = 1;
  for (int64_t d = 3; d >= 0; --d) {
    STD_TORCH_CHECK(images.size(d) == like.size(d), name, ": expected size ", like.size(d), " of dimension ",
                    d, ", got ", images.size(d));
    STD_TORCH_CHECK(d == 0 || images.size(d) == 1 || images.stride(d) == expected, name,
                    ": expected dense samples");
    expected *= images.size(d);
  }
}

void check_float32(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool right = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous() &&
               tensor.scalar_type() == ScalarType::Float;
  int64_t d = 0;
  for (const int64_t size : shape) right = right && tensor.size(d++) == size;
  STD_TORCH_CHECK(right, name, ": expected contiguous float32 of the shape that prediction and band imply");
}

// `limit`: so that indices within a plane, and the coefficients of a plane, fit in 32 bits.
int narrow(const char* name, int64_t value, int64_t limit) {
  STD_TORCH_CHECK(value < limit, name, ": expected a size below ", limit, ", got ", value);
  return static_cast<int>(value);
}

void lowpass_residual(const Tensor& prediction, const Tensor& target, const Tensor& weight,
                      const Tensor& band, double inside, double outside, const Tensor& row_basis,
                      const Tensor& column_basis, const Tensor& energy, const Tensor& gradient) {
  check_images("prediction", prediction, prediction);
  check_images("target", target, prediction);
  check_images("gradient", gradient, prediction);
  for (const Tensor* tensor : {&target, &weight, &band, &row_basis, &column_basis, &energy, &gradient})
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == prediction.get_device_index(),
                    "expected all tensors on the device of prediction");
  STD_TORCH_CHECK(gradient.scalar_type() == prediction.scalar_type(),
                  "gradient: expected the prediction's dtype");
  STD_TORCH_CHECK(band.dim() == 2, "band: expected 2 dimensions, got ", band.dim());

  Arguments a = {};
  a.batch = narrow("batch", prediction.size(0), INT32_MAX);
  a.channels = narrow("channels", prediction.size(1), INT32_MAX);
  a.height = narrow("height", prediction.size(2), 1 << 15);
  a.width = narrow("width", prediction.size(3), 1 << 15);
  a.row_frequencies = narrow("band", band.size(0), 1 << 15);
  a.column_frequencies = narrow("band", band.size(1), 1 << 15);
  STD_TORCH_CHECK(0 < a.row_frequencies && a.row_frequencies <= a.height / 2 + 1 &&
                      0 < a.column_frequencies && a.column_frequencies <= a.width / 2 + 1,
                  "band: expected 1 to ", a.height / 2 + 1, " by 1 to ", a.width / 2 + 1,
                  " frequencies, got ", a.row_frequencies, " by ", a.column_frequencies);
  a.row_columns = 2 * a.row_frequencies - 1 < a.height ? 2 * a.row_frequencies - 1 : a.height;
  a.column_columns = 2 * a.column_frequencies - 1 < a.width ? 2 * a.column_frequencies - 1 : a.width;
  a.weight_is_double = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == a.batch && weight.is_contiguous() &&
                      (a.weight_is_double || weight.scalar_type() == ScalarType::Float),
                  "weight: expected ", a.batch, " contiguous float32 or float64");
  check_float32("band", band, {a.row_frequencies, a.column_frequencies});
  check_float32("row_basis", row_basis, {a.height, a.row_columns});
  check_float32("column_basis", column_basis, {a.width, a.column_columns});
  check_float32("energy", energy, {a.batch});

  a.prediction_type = type_of("prediction", prediction);
  a.target_type = type_of("target", target);
  a.prediction = prediction.const_data_ptr();
  a.target = target.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.band = band.const_data_ptr<float>();
  a.row_basis = row_basis.const_data_ptr<float>();
  a.column_basis = column_basis.const_data_ptr<float>();
  a.energy = energy.mutable_data_ptr<float>();
  a.gradient = gradient.mutable_data_ptr();
  a.prediction_stride = prediction.stride(0);
  a.target_stride = target.stride(0);
  a.gradient_stride = gradient.stride(0);
  a.inside = static_cast<float>(inside);
  a.outside = static_cast<float>(outside);
  const Plan plan = make_plan(a);

  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  const Tensor scratch = torch::stable::new_empty(energy, {plan.coefficients + plan.partials});
  a.coefficients = scratch.mutable_data_ptr<float>();
  a.partials = a.coefficients + plan.coefficients;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(prediction.get_device_index(), &stream));
  const char* error = fastunlearn_lowpass_launch(&plan, &a, stream);
  STD_TORCH_CHECK(error == nullptr, "lowpass_residual: ", error);
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CUDA, m) {
  m.impl("lowpass_residual", TORCH_BOX(&fastunlearn::lowpass_residual));
}
