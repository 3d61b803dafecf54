// What the bindings share: the stable ABI of torch, and checks that name the argument, what was expected and
// what was given.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dispatch.h"

// Raised with every new kernel and every change of the arguments of one; fastunlearn/ops/_backends.py has the
// same number and refuses a library of another.
extern "C" __attribute__((visibility("default"), weak)) int fastunlearn_revision() { return 2; }

namespace fastunlearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows are read through their index: one outside the store would read memory that is not ours.
inline void check_index(const char* name, const std::optional<Tensor>& index, int64_t rows) {
  if (!index) return;
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->is_contiguous(), name,
                  ": expected contiguous int64");
  const int64_t* value = index->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index->numel(); ++i)
    STD_TORCH_CHECK(value[i] >= 0 && value[i] < rows, name, ": expected rows in [0, ", rows - 1, "], got ",
                    value[i]);
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

}  // namespace fastunlearn
