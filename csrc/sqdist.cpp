// sqdist (all squared distances) and nearest (the k smallest of each query, merged with those of earlier
// rows).
#include "sqdist.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>

#include "common.h"

FASTUNLEARN_DISPATCH(sqdist, SqdistArgs)
FASTUNLEARN_DISPATCH(sqdist_pack, SqdistArgs)

namespace fastunlearn {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

// Uninitialised, aligned as vector loads want it.
template <class T>
std::unique_ptr<T[], Release> allocate(int64_t count) {
  return std::unique_ptr<T[], Release>(static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)));
}

// u8 times s8 with int32 sums, unless FASTUNLEARN_VNNI=0.
bool use_vnni() {
#ifdef FASTUNLEARN_X86
  const char* wanted = std::getenv("FASTUNLEARN_VNNI");
  if (wanted != nullptr && !std::strcmp(wanted, "0")) return false;
  if (isa() == kAvx512) return __builtin_cpu_supports("avx512vnni");
  if (isa() == kAvx2) return __builtin_cpu_supports("avxvnni");
#endif
  return false;
}

void check_rows(const char* name, const Tensor& rows) {
  const bool bytes = rows.dim() == 2 && rows.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bytes, name, ": expected uint8 of two dimensions");
  const bool gaps = rows.size(1) > 1 && rows.stride(1) != 1;
  STD_TORCH_CHECK(!gaps, name, ": expected rows without gaps, got a column stride of ", rows.stride(1));
  STD_TORCH_CHECK(rows.size(0) > 0 && rows.size(1) > 0, name, ": expected at least one row and one column");
}

void check_int64(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  const bool dense = tensor.scalar_type() == ScalarType::Long && tensor.dim() == 2 && tensor.is_contiguous();
  STD_TORCH_CHECK(dense, name, ": expected contiguous int64 of two dimensions");
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, name, ": expected shape [", rows, ", ",
                  columns, "], got [", tensor.size(0), ", ", tensor.size(1), "]");
}

bool before(const Neighbor& a, const Neighbor& b) {
  return a.distance != b.distance ? a.distance < b.distance : a.row < b.row;
}

void keep_smallest(Neighbor* found, int64_t k) {
  std::nth_element(found, found + k - 1, found + 2 * k, before);
}

// What each thread has to itself.
struct Worker {
  std::unique_ptr<char[], Release> block;
  std::unique_ptr<int64_t[], Release> row_terms, sums, count, limits;
  std::unique_ptr<Neighbor[], Release> found;
};

Worker new_worker(const SqdistArgs& a) {
  Worker worker;
  worker.block = allocate<char>(a.block_rows * a.width * (a.vnni ? 1 : 2));
  worker.row_terms = allocate<int64_t>(a.block_rows);
  if (a.chunks > 1)
    worker.sums = allocate<int64_t>(std::min(a.panels, kPanelsInPass) * a.block_rows * kLanes);
  if (a.k == 0) return worker;
  worker.found = allocate<Neighbor>(a.num_queries * 2 * a.k);
  worker.count = allocate<int64_t>(a.num_queries);
  worker.limits = allocate<int64_t>(a.panels * kLanes);
  return worker;
}

// Nothing found yet; a new row has to be nearer than the k-th of earlier ones.
void start(const SqdistArgs& a, const int64_t* earlier) {
  constexpr int64_t kFar =
      std::numeric_limits<int64_t>::max() / 2;  // beyond all distances, less any query term
  std::fill_n(a.count, a.num_queries, 0);
  std::fill_n(a.limits, a.panels * kLanes,
              std::numeric_limits<int64_t>::min());  // no row is near a query that is none
  for (int64_t q = 0; q < a.num_queries; ++q)
    a.limits[q] = std::min(earlier[q * a.k + a.k - 1], kFar) - a.query_terms[q];
}

// All rows, block by block: a thread that is held up by other processes takes fewer. `distances` is written
// (k = 0), or has the ascending distances of what was found before.
std::vector<Worker> run(SqdistArgs args, int64_t* distances) {
  plan(args, use_vnni());
  const auto packed = allocate<char>(args.chunks * args.panels * kLanes * args.width * (args.vnni ? 1 : 2));
  const auto query_terms = allocate<int64_t>(args.panels * kLanes);
  args.packed = packed.get();
  args.query_terms = query_terms.get();
  args.distances = distances;
  args.keep_smallest = keep_smallest;
  const int64_t blocks = (args.num_rows + args.block_rows - 1) / args.block_rows;
  std::vector<Worker> workers(std::min<int64_t>(torch::stable::get_num_threads(), blocks));
  for (Worker& worker : workers) worker = new_worker(args);

  const auto pack = pick_sqdist_pack();
  const auto search = pick_sqdist();
  torch::stable::parallel_for(0, args.panels, 1, [&](int64_t begin, int64_t end) { pack(args, begin, end); });
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(workers.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      SqdistArgs own = args;
      own.block = workers[w].block.get();
      own.row_terms = workers[w].row_terms.get();
      own.sums = workers[w].sums.get();
      own.found = workers[w].found.get();
      own.count = workers[w].count.get();
      own.limits = workers[w].limits.get();
      if (own.k > 0) start(own, distances);
      for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;)
        search(own, block * own.block_rows, std::min((block + 1) * own.block_rows, own.num_rows));
    }
  });
  return workers;
}

SqdistArgs arguments(const Tensor& queries, const Tensor& rows) {
  check_rows("queries", queries);
  check_rows("rows", rows);
  STD_TORCH_CHECK(queries.size(1) == rows.size(1), "rows: expected ", queries.size(1),
                  " columns, as queries, got ", rows.size(1));
  SqdistArgs args{};
  args.queries = queries.const_data_ptr<uint8_t>();
  args.rows = rows.const_data_ptr<uint8_t>();
  args.query_stride = queries.stride(0);
  args.row_stride = rows.stride(0);
  args.num_queries = queries.size(0);
  args.num_rows = rows.size(0);
  args.columns = queries.size(1);
  return args;
}

// What the workers found of query q joins the k best of earlier rows, whose empty places are at the end.
void merge(const SqdistArgs& a, const std::vector<Worker>& workers, int64_t q, int64_t* distance,
           int64_t* row) {
  Neighbor* best = workers[0].found.get() + q * 2 * a.k;
  int64_t count = workers[0].count[q];
  const auto add = [&](const Neighbor& entry) {
    best[count++] = entry;
    if (count < 2 * a.k) return;
    keep_smallest(best, a.k);
    count = a.k;
  };
  for (int64_t j = 0; j < a.k && row[j] >= 0; ++j) add({distance[j], row[j]});
  for (size_t w = 1; w < workers.size(); ++w) {
    const Neighbor* found = workers[w].found.get() + q * 2 * a.k;
    std::for_each(found, found + workers[w].count[q], add);
  }
  std::sort(best, best + count, before);
  for (int64_t j = 0; j < std::min(a.k, count); ++j) distance[j] = best[j].distance, row[j] = best[j].row;
}

void sqdist_cpu(const Tensor& queries, const Tensor& rows, Tensor distances) {
  const SqdistArgs args = arguments(queries, rows);
  check_int64("distances", distances, args.num_queries, args.num_rows);
  run(args, distances.mutable_data_ptr<int64_t>());
}

// Rows are numbered from `first_row`, beyond all numbers that `index` holds.
void nearest_cpu(const Tensor& queries, const Tensor& rows, int64_t first_row, Tensor distances,
                 Tensor index) {
  SqdistArgs args = arguments(queries, rows);
  args.k = distances.size(1);
  args.first_row = first_row;
  STD_TORCH_CHECK(args.k > 0, "distances: expected at least one column");
  check_int64("distances", distances, args.num_queries, args.k);
  check_int64("index", index, args.num_queries, args.k);
  int64_t* const distance = distances.mutable_data_ptr<int64_t>();
  int64_t* const row = index.mutable_data_ptr<int64_t>();
  const std::vector<Worker> workers = run(args, distance);

  torch::stable::parallel_for(0, args.num_queries, 64, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) merge(args, workers, q, distance + q * args.k, row + q * args.k);
  });
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("sqdist", TORCH_BOX(&fastunlearn::sqdist_cpu));
  m.impl("nearest", TORCH_BOX(&fastunlearn::nearest_cpu));
}
