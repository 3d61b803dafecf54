// Binding of csrc/lowpass_residual.h: checks, the folded axes with their tables, and planes shared among
// threads.
#include "lowpass_residual.h"

#include <algorithm>

#include "common.h"

FASTUNLEARN_DISPATCH(lowpass_residual, LowpassResidualArgs)

namespace fastunlearn {
namespace {

// An axis is folded on while the next leaves get three frequencies or more: smaller ones cost more than they
// save.
constexpr int64_t kWorthFolding = 5;

// A leaf is split while it has so many coefficients.
constexpr int64_t kWorthSplitting = 12;

// Columns of narrow planes that are transformed side by side: enough to fill the vectors, and they stay in
// the cache.
constexpr int64_t kNarrow = 128, kColumns = 512;

// Gradients of this size leave the caches before anyone reads them: streamed, their old contents are not
// fetched.
constexpr int64_t kStreamBytes = 4 << 20;

// A folded axis, and the memory of its tables.
template <class Real>
class AxisTables {
 public:
  // `basis` [size, coefficients or more]: constant, cosine and sine of u = 1, 2, ..., `(-1)^n` at size / 2.
  AxisTables(const Tensor& basis, int64_t coefficients)
      : basis_(basis.const_data_ptr<Real>()), basis_stride_(basis.size(1)), coefficients_(coefficients) {
    const int64_t size = basis.size(0);
    axis.size = size;
    axis.coefficients = coefficients;
    place.resize(coefficients);
    tables_.resize(kMaxLeaves * kMaxParts);
    // Left to fold, for the multiples of `step`: rows 0 to period / 2 (cosines), the last (period - 1) / 2
    // (sines).
    int64_t period = size, step = 1;
    if (size % 2 == 0) {
      const int64_t half = size / 2;
      axis.num_fours = (half - 1) / 2;
      add_mirror(0, half, 1);
      if (half % 2 == 0) add_mirror(half / 2, half / 2 + half, 1);
    } else {
      add_mirror(1, size - 1, size / 2);
    }
    while (period % 2 == 0 && (step == 1 || kWorthFolding * step <= coefficients / 2) &&
           axis.num_leaves + 4 <= kMaxLeaves) {
      const int64_t half = period / 2, pairs = (half + 1) / 2;
      if (step > 1) {
        add_mirror(0, half, pairs);
        add_mirror(size - half + 1, size - 1, pairs - 1);
      }
      const int64_t symmetric = period % 4 == 0 ? period / 4 : 0;
      add_leaf(half / 2 + 1, pairs, step, 2 * step, 1, symmetric);
      add_leaf(size - half + 1, half / 2, step, 2 * step, 0, symmetric);
      period = half;
      step *= 2;
    }
    add_leaf(0, period / 2 + 1, 0, step, 1, 0);
    add_leaf(size - (period - 1) / 2, (period - 1) / 2, step, step, 0, 0);
  }
  AxisTables(const AxisTables&) = delete;

  FoldedAxis axis = {};
  std::vector<int64_t> place;  // [coefficients]: column of the basis -> place among the leaves

 private:
  void add_mirror(int64_t first, int64_t last, int64_t count) {
    axis.mirrors[axis.num_mirrors++] = {first, last, count};
  }

  // The cosines or sines of the frequencies first, first + step, ... Where they are odd multiples of `first`,
  // there are `symmetric` of them in all, and number symmetric - 1 - k is number k with signs that alternate
  // from row to row.
  void add_leaf(int64_t first_row, int64_t rows, int64_t first, int64_t step, int64_t cosine,
                int64_t symmetric) {
    std::vector<int64_t> columns;
    for (int64_t u = first; 2 * u - cosine < coefficients_; u += step)
      columns.push_back(u == 0 ? 0 : 2 * u - cosine);
    const int64_t count = columns.size(), end = first_row + rows;
    Leaf& leaf = axis.leaves[axis.num_leaves++];
    leaf.first = axis.room;
    leaf.count = count;

    // How many coefficients all rows tell apart, every second row, every fourth, and so on.
    std::vector<int64_t> sizes = {symmetric};
    while (symmetric >= kWorthSplitting && sizes.size() < kMaxParts) {
      const int64_t size = sizes.back();
      sizes.push_back(size - size / 2);
      if (size % 2 != 0 || size / 2 < kWorthSplitting) break;
    }
    if (count <= sizes.back()) sizes.resize(1);  // nothing that a split would save
    const int64_t splits = sizes.size() - 1;
    const int64_t smallest = splits > 0 ? sizes.back() : count, coarsest = int64_t{1} << splits;
    // A difference is that of the rows between less that of the others: minus cosine number K - 1 - k. A
    // coefficient may have any sign, as long as the way back has the same.
    std::vector<Real> sign(std::max(count, symmetric), 1);
    add_part(leaf, columns, sign, first_row, end, coarsest, 0, smallest, smallest);
    for (int64_t split = splits - 1; split >= 0; --split) {
      const int64_t size = sizes[split];
      // The one in the middle is 0 in the rows between for cosines, and in the others for sines.
      add_part(leaf, columns, sign, first_row, end, int64_t{2} << split, int64_t{1} << split, size,
               cosine ? size / 2 : size - size / 2);
      for (int64_t k = 0; k < size / 2 && cosine; ++k) sign[size - 1 - k] = -sign[k];
    }

    for (int64_t j = 0; j < count; ++j) place[columns[j]] = axis.room + j;
    int64_t p = 0;
    while (leaf.parts[p].size < count) ++p;
    axis.room += p == 0 ? count : leaf.parts[p].size;
  }

  // The rows in [first_row, end) whose numbers are `rest` modulo `step`.
  void add_part(Leaf& leaf, const std::vector<int64_t>& columns, const std::vector<Real>& sign,
                int64_t first_row, int64_t end, int64_t step, int64_t rest, int64_t size, int64_t count) {
    const int64_t first = first_row + ((rest - first_row) % step + step) % step;
    count = std::min<int64_t>(count, columns.size());
    const int64_t rows = first < end ? (end - first + step - 1) / step : 0;
    std::vector<Real>& table = tables_[(axis.num_leaves - 1) * kMaxParts + leaf.num_parts];
    table.resize(rows * count);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < count; ++j)
        table[row * count + j] = sign[j] * basis_[(first + row * step) * basis_stride_ + columns[j]];
    leaf.parts[leaf.num_parts++] = {first, step, rows, size, count, table.data()};
  }

  const Real* basis_;
  int64_t basis_stride_, coefficients_;
  std::vector<std::vector<Real>> tables_;
};

template <class Real>
void run(LowpassResidualArgs& args, int64_t batch, const Tensor& band, const Tensor& row_basis,
         const Tensor& column_basis) {
  // A scheduled band has a table for its largest radius; frequencies beyond the last 1 need no transform.
  const float* table = band.const_data_ptr<float>();
  const int64_t table_rows = band.size(0), table_columns = band.size(1);
  int64_t rows = 1, columns = 1;
  for (int64_t u = 0; u < table_rows; ++u) {
    int64_t v = table_columns;
    while (v > 0 && table[u * table_columns + v - 1] == 0) --v;
    if (v > 0) rows = u + 1;
    columns = std::max(columns, v);
  }
  const AxisTables<Real> height(row_basis, std::min(2 * rows - 1, row_basis.size(1)));
  const AxisTables<Real> width(column_basis, std::min(2 * columns - 1, column_basis.size(1)));
  args.height = height.axis;
  args.width = width.axis;
  args.lane_place = height.place.data();

  const int64_t lanes = args.height.coefficients, planes = batch * args.channels;
  args.planes =
      std::max<int64_t>(1, std::min(planes, args.width.size > kNarrow ? 1 : kColumns / args.width.size));
  args.column_stride = row_stride(args.planes * (args.width.size + 15));
  args.lane_stride = row_stride(args.planes * lanes);

  std::vector<Real> mask(args.width.room * args.lane_stride);
  std::vector<int64_t> reach(args.width.room);
  for (int64_t column = 0; column < args.width.coefficients; ++column) {
    Real* row = mask.data() + width.place[column] * args.lane_stride;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      row[lane] = table[(lane + 1) / 2 * table_columns + (column + 1) / 2];
      if (row[lane] != 0) reach[width.place[column]] = lane + 1;
    }
    for (int64_t plane = 1; plane < args.planes; ++plane) std::copy(row, row + lanes, row + plane * lanes);
  }
  args.mask = mask.data();
  args.reach = reach.data();

  const auto kernel = pick_lowpass_residual();
  torch::stable::parallel_for(0, planes, args.planes, [&](int64_t begin, int64_t end) {
    thread_local std::vector<Real> scratch;  // kept: fresh pages would cost more than small inputs do
    if (const size_t needed = lowpass_scratch(args) + 64 / sizeof(Real); scratch.size() < needed)
      scratch.resize(needed);
    LowpassResidualArgs mine = args;
    mine.scratch = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    kernel(mine, begin, end);
  });
}

Type type_of(const Tensor& tensor) { return static_cast<Type>(tensor.scalar_type()); }

bool is_float(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

void check_images(const char* name, const Tensor& images, const Tensor& like) {
  STD_TORCH_CHECK(images.dim() == 4 && is_float(images), name,
                  ": expected a floating-point tensor of 4 dimensions, got ", images.dim());
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(images.size(d) == like.size(d), name, ": expected size ", like.size(d), " of dimension ",
                    d, ", got ", images.size(d));
  int64_t expected = 1;
  for (int64_t d = 3; d > 0; --d) {
    STD_TORCH_CHECK(images.size(d) == 1 || images.stride(d) == expected, name, ": expected dense samples");
    expected *= images.size(d);
  }
}

void check_basis(const char* name, const Tensor& basis, int64_t size, int64_t frequencies, ScalarType type) {
  const int64_t columns = std::min(2 * frequencies - 1, size);
  STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) == size && basis.size(1) == columns, name,
                  ": expected shape [", size, ", ", columns, "]");
  STD_TORCH_CHECK(basis.scalar_type() == type && basis.is_contiguous(), name, ": expected contiguous ",
                  type == ScalarType::Double ? "float64" : "float32");
}

void lowpass_residual(const Tensor& prediction, const Tensor& target, const Tensor& weight,
                      const Tensor& band, double inside, double outside, const Tensor& row_basis,
                      const Tensor& column_basis, const Tensor& energy, const Tensor& gradient) {
  check_images("prediction", prediction, prediction);
  check_images("target", target, prediction);
  check_images("gradient", gradient, prediction);
  STD_TORCH_CHECK(prediction.numel() > 0, "prediction: expected at least one image, got none");
  const int64_t batch = prediction.size(0), height = prediction.size(2), width = prediction.size(3);
  const bool is_double = prediction.scalar_type() == ScalarType::Double;
  const ScalarType compute = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(gradient.is_contiguous() && gradient.scalar_type() == prediction.scalar_type(),
                  "gradient: expected the prediction's dtype, contiguous");
  STD_TORCH_CHECK(energy.dim() == 1 && energy.size(0) == batch && energy.is_contiguous() &&
                      energy.scalar_type() == compute,
                  "energy: expected ", batch, " contiguous ", is_double ? "float64" : "float32");
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == batch && weight.is_contiguous() &&
          (weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Double),
      "weight: expected ", batch, " contiguous float32 or float64");
  STD_TORCH_CHECK(band.dim() == 2 && band.is_contiguous() && band.scalar_type() == ScalarType::Float,
                  "band: expected a contiguous float32 tensor of 2 dimensions");
  check_basis("row_basis", row_basis, height, band.size(0), compute);
  check_basis("column_basis", column_basis, width, band.size(1), compute);

  const bool is_wide = weight.scalar_type() == ScalarType::Double;
  std::vector<double> weights(batch), energies(batch * prediction.size(1));
  for (int64_t b = 0; b < batch; ++b)
    weights[b] = is_wide ? weight.const_data_ptr<double>()[b] : weight.const_data_ptr<float>()[b];
  LowpassResidualArgs args = {};
  args.prediction_type = type_of(prediction);
  args.target_type = type_of(target);
  args.compute_type = type_of(energy);
  args.prediction = prediction.const_data_ptr();
  args.target = target.const_data_ptr();
  args.gradient = gradient.mutable_data_ptr();
  args.prediction_stride = prediction.stride(0);
  args.target_stride = target.stride(0);
  args.channels = prediction.size(1);
  const int64_t element = is_double ? 8 : 4;
  args.stream = type_of(gradient) == type_of(energy) && gradient.numel() * element >= kStreamBytes &&
                width * element % 64 == 0 && reinterpret_cast<uintptr_t>(args.gradient) % 64 == 0;
  args.weight = weights.data();
  args.inside = inside;
  args.outside = outside;
  args.energy = energies.data();
  is_double ? run<double>(args, batch, band, row_basis, column_basis)
            : run<float>(args, batch, band, row_basis, column_basis);
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0;
    for (int64_t c = 0; c < args.channels; ++c) sum += energies[b * args.channels + c];
    is_double ? energy.mutable_data_ptr<double>()[b] = weights[b] * sum
              : energy.mutable_data_ptr<float>()[b] = static_cast<float>(weights[b] * sum);
  }
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("lowpass_residual", TORCH_BOX(&fastunlearn::lowpass_residual));
}
