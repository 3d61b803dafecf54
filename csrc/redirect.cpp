// Binding of redirect; the arguments are described in fastunlearn/ops/redirect.py.
#include "redirect.h"

#include <algorithm>
#include <memory>

#include "image_binding.h"

FASTUNLEARN_DISPATCH(redirect, RedirectArgs)

namespace fastunlearn {
namespace {

/// `[B, k, C, H, W]`, or with an index `[B, k]` rows `[M, C, H, W]`; the images are those that the neighbours
/// are of.
Rows checked_neighbors(const Tensor& neighbors, const std::optional<Tensor>& index, int64_t batch,
                       const Tensor& images) {
  const int64_t before = index ? 1 : 2;  // dimensions in front of C
  STD_TORCH_CHECK(neighbors.dim() == before + 3, "neighbors: expected ",
                  index ? "[M, C, H, W] with" : "[B, K, C, H, W] without", " neighbor_index, got ",
                  neighbors.dim(), " dimensions");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(neighbors.size(before + i) == images.size(1 + i), "neighbors: expected images of [",
                    images.size(1), ", ", images.size(2), ", ", images.size(3), "], got ",
                    neighbors.size(before + i), " in dimension ", before + i);
  check_contiguous("neighbors", neighbors);
  check_index("neighbor_index", index, neighbors.size(0));
  const Tensor& counted = index ? *index : neighbors;
  STD_TORCH_CHECK(!index || index->dim() == 2, "neighbor_index: expected [B, K], got ", counted.dim(),
                  " dimensions");
  STD_TORCH_CHECK(counted.size(0) == batch && counted.size(1) > 0, index ? "neighbor_index" : "neighbors",
                  ": expected [", batch, ", K >= 1], got [", counted.size(0), ", ", counted.size(1), "]");
  const bool bytes = neighbors.scalar_type() == ScalarType::Byte;
  return {neighbors.const_data_ptr(), bytes ? Type::kUint8 : float_type("neighbors", neighbors),
          index ? index->const_data_ptr<int64_t>() : nullptr};
}

/// A contiguous tensor of `type`, `[rows]` or, with columns, `[rows, columns]`.
void check_table(const char* name, const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected ", torch::headeronly::toString(type),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == rows && tensor.numel() == rows * columns, name,
                  ": expected ", rows, " rows of ", columns, ", got ", tensor.numel(), " numbers");
  check_contiguous(name, tensor);
}

void fill_redirect(const Tensor& images, const std::optional<Tensor>& index, const Tensor& neighbors,
                   const std::optional<Tensor>& neighbor_index, const Tensor& coefficients,
                   const std::optional<Tensor>& sqdist, const std::optional<Tensor>& noise,
                   const std::optional<Tensor>& counter, int64_t purpose, ScalarType dtype,
                   bool channels_last, Tensor x_t, Tensor target, Tensor spread, Tensor weights) {
  RedirectArgs args = {};
  args.coefficients = checked_coefficients(coefficients);
  const int64_t batch = coefficients.size(0);
  args.images = checked_rows("images", images, "index", index, batch);
  args.neighbors = checked_neighbors(neighbors, neighbor_index, batch, images);
  args.k = neighbor_index ? neighbor_index->size(1) : neighbors.size(1);
  args.noise = checked_noise(noise, counter, purpose, batch, images);
  args.extent = extent_of(images, channels_last);
  args.x_t = checked_output("x_t", x_t, dtype, batch, images, args.extent);
  args.target = checked_output("target", target, target_type(dtype), batch, images, args.extent);
  args.in_double = args.images.type == Type::kDouble || args.neighbors.type == Type::kDouble ||
                   args.noise.type == Type::kDouble;
  if (sqdist) {
    check_table("sqdist", *sqdist, ScalarType::Double, batch, args.k);
    args.sqdist = sqdist->const_data_ptr<double>();
  }
  const ScalarType computed = args.in_double ? ScalarType::Double : ScalarType::Float;
  check_table("spread", spread, computed, batch, 1);
  check_table("weights", weights, computed, batch, args.k);
  args.spread = spread.mutable_data_ptr();
  args.weights = weights.mutable_data_ptr();

  const int64_t elements = args.extent.channels * args.extent.pixels;
  const Type type = args.in_double ? Type::kDouble : Type::kFloat;
  const int64_t made_noise = args.noise.data != nullptr && args.noise.type == type ? 0 : elements;
  const auto kernel = pick_redirect();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, args.k * elements));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> noise_scratch(new double[made_noise]), scratch(new double[2 * args.k]);
    const std::unique_ptr<int64_t[]> row_scratch(new int64_t[args.k]);
    RedirectArgs own = args;
    own.noise_scratch = noise_scratch.get();
    own.scratch = scratch.get();
    own.row_scratch = row_scratch.get();
    kernel(own, begin, end);
  });
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("redirect", TORCH_BOX(&fastunlearn::fill_redirect));
}
