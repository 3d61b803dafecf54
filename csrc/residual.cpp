// Binding of residual; the arguments are described in fastunlearn/ops/residual.py.
#include "residual.h"

#include <algorithm>
#include <utility>

#include "image_binding.h"

FASTUNLEARN_DISPATCH(residual, ResidualArgs)

namespace fastunlearn {
namespace {

int64_t elements_of(const Tensor& tensor) {
  int64_t elements = 1;
  for (int64_t i = 1; i < tensor.dim(); ++i) elements *= tensor.size(i);
  return elements;
}

/// The samples of `tensor` must fill their memory: no gaps, no overlaps, any order of dimensions.
void check_dense_samples(const char* name, const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 1; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1) dimensions.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    STD_TORCH_CHECK(stride == expected, name, ": expected samples without gaps, got stride ", stride,
                    " in place of ", expected);
    expected *= size;
  }
  STD_TORCH_CHECK(tensor.size(0) < 2 || tensor.stride(0) >= expected, name,
                  ": expected samples that do not overlap, got stride ", tensor.stride(0));
}

void check_order(const char* name, const Tensor& tensor, const Tensor& gradient) {
  STD_TORCH_CHECK(tensor.dim() == gradient.dim(), name, ": expected ", gradient.dim(),
                  " dimensions, as in gradient, got ", tensor.dim());
  for (int64_t i = 0; i < gradient.dim(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == gradient.size(i), name, ": expected size ", gradient.size(i),
                    " in dimension ", i, ", as in gradient, got ", tensor.size(i));
    STD_TORCH_CHECK(i == 0 || tensor.size(i) < 2 || tensor.stride(i) == gradient.stride(i), name,
                    ": expected stride ", gradient.stride(i), " in dimension ", i, ", as in gradient, got ",
                    tensor.stride(i));
  }
}

/// `[B]` float32 or float64.
std::vector<double> checked_weight(const Tensor& weight, int64_t batch) {
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "weight: expected float32 or float64, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == batch, "weight: expected [", batch, "], got ",
                  weight.numel(), " numbers");
  check_contiguous("weight", weight);
  std::vector<double> values(batch);
  if (type == ScalarType::Float)
    std::copy_n(weight.const_data_ptr<float>(), batch, values.begin());
  else
    std::copy_n(weight.const_data_ptr<double>(), batch, values.begin());
  return values;
}

void fill_residual(const Tensor& prediction, const Tensor& target, const Tensor& weight, Tensor loss,
                   Tensor gradient) {
  STD_TORCH_CHECK(prediction.dim() > 0, "prediction: expected [B, ...], got a scalar");
  const int64_t batch = prediction.size(0);
  check_dense_samples("gradient", gradient);
  check_order("prediction", prediction, gradient);
  check_order("target", target, gradient);
  const std::vector<double> weights = checked_weight(weight, batch);

  ResidualArgs args = {};
  args.prediction = prediction.const_data_ptr();
  args.target = target.const_data_ptr();
  args.gradient = gradient.mutable_data_ptr();
  args.prediction_type = float_type("prediction", prediction);
  args.target_type = float_type("target", target);
  args.prediction_stride = prediction.stride(0);
  args.target_stride = target.stride(0);
  args.gradient_stride = gradient.stride(0);
  args.elements = elements_of(prediction);
  args.weight = weights.data();
  args.loss = loss.mutable_data_ptr();
  STD_TORCH_CHECK(gradient.scalar_type() == prediction.scalar_type(),
                  "gradient: expected the type of prediction");
  STD_TORCH_CHECK(loss.scalar_type() == target_type(prediction.scalar_type()),
                  "loss: expected float32, or float64 where prediction is");
  STD_TORCH_CHECK(loss.dim() == 1 && loss.size(0) == batch && loss.is_contiguous(), "loss: expected [", batch,
                  "] without gaps");

  const auto kernel = pick_residual();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, args.elements));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("residual", TORCH_BOX(&fastunlearn::fill_residual));
}
