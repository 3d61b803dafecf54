// Checked views of image tensors for the bindings of noising and mixture. Every message names the argument.
#pragma once

#include <algorithm>

#include "common.h"
#include "image_blocks.h"

namespace fastunlearn {

inline Type float_type(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  const bool known = type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
                     type == ScalarType::Double;
  STD_TORCH_CHECK(known, name, ": expected float16, bfloat16, float32 or float64, got ",
                  torch::headeronly::toString(type));
  return static_cast<Type>(type);
}

/// `[N, C, H, W]` rows for `batch` samples of shape `like`.
inline Rows checked_rows(const char* name, const Tensor& images, const char* index_name,
                         const std::optional<Tensor>& index, int64_t batch) {
  STD_TORCH_CHECK(images.dim() == 4, name, ": expected [N, C, H, W], got ", images.dim(), " dimensions");
  check_contiguous(name, images);
  check_index(index_name, index, images.size(0));
  const int64_t samples = index ? index->numel() : images.size(0);
  STD_TORCH_CHECK(samples == batch, index ? index_name : name, ": expected ", batch, " samples, got ",
                  samples);
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  return {images.const_data_ptr(), bytes ? Type::kUint8 : float_type(name, images),
          index ? index->const_data_ptr<int64_t>() : nullptr};
}

/// `[B, 5]` float64; B is the number of samples.
inline const double* checked_coefficients(const Tensor& coefficients) {
  const bool table = coefficients.dim() == 2 && coefficients.size(1) == 5;
  STD_TORCH_CHECK(table && coefficients.scalar_type() == ScalarType::Double,
                  "coefficients: expected float64 [B, 5]");
  check_contiguous("coefficients", coefficients);
  return coefficients.const_data_ptr<double>();
}

inline void check_shape(const char* name, const Tensor& tensor, int64_t batch, const Tensor& images) {
  bool same = tensor.dim() == 4 && tensor.size(0) == batch;
  for (int64_t i = 1; same && i < 4; ++i) same = tensor.size(i) == images.size(i);
  STD_TORCH_CHECK(same, name, ": expected shape [", batch, ", ", images.size(1), ", ", images.size(2), ", ",
                  images.size(3), "]");
}

/// Noise in the shape of `batch` images, or where there is none the counter: int64 `[3]`, seed, step, first
/// row.
inline Noise checked_noise(const std::optional<Tensor>& noise, const std::optional<Tensor>& counter,
                           int64_t purpose, int64_t batch, const Tensor& images) {
  if (noise) {
    check_shape("noise", *noise, batch, images);
    check_contiguous("noise", *noise);
    return {noise->const_data_ptr(), float_type("noise", *noise), 0, 0, 0, 0};
  }
  STD_TORCH_CHECK(counter.has_value(), "counter: expected one where there is no noise, got None");
  STD_TORCH_CHECK(counter->scalar_type() == ScalarType::Long && counter->numel() == 3,
                  "counter: expected int64 [3]");
  check_contiguous("counter", *counter);
  const int64_t* words = counter->const_data_ptr<int64_t>();
  return {nullptr,
          Type::kFloat,
          static_cast<uint64_t>(words[0]),
          static_cast<uint32_t>(words[1]),
          static_cast<uint32_t>(words[2]),
          static_cast<uint32_t>(purpose)};
}

/// The extent of the images, which are read in NCHW order, and of the results, which may have their channels
/// last.
inline Extent extent_of(const Tensor& images, bool channels_last) {
  const int64_t channels = images.size(1), pixels = images.size(2) * images.size(3);
  return {channels, pixels, channels_last && channels > 1 && pixels > 1};  // else both layouts are the same
}

/// Results in the shape of `batch` images and of type `dtype`, dense in the layout that `extent` names.
inline Output checked_output(const char* name, const Tensor& output, ScalarType dtype, int64_t batch,
                             const Tensor& images, const Extent& extent) {
  check_shape(name, output, batch, images);
  STD_TORCH_CHECK(output.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(output.scalar_type()));
  const int64_t width = images.size(3), elements = extent.channels * extent.pixels;
  const int64_t pixel = extent.channels_last ? extent.channels : 1;
  const int64_t strides[4] = {elements, extent.channels_last ? 1 : extent.pixels, width * pixel, pixel};
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(output.size(i) == 1 || output.stride(i) == strides[i], name, ": expected stride ",
                    strides[i], " in dimension ", i, ", got ", output.stride(i));
  return {output.mutable_data_ptr(), float_type(name, output)};
}

inline ScalarType target_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

/// Samples that are worth a thread.
inline int64_t samples_per_thread(const Extent& extent) {
  constexpr int64_t elements = 1 << 14;
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, extent.channels * extent.pixels));
}

}  // namespace fastunlearn
