// Bindings of attention and attention_backward; the arguments are described in fastunlearn/ops/attention.py.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "common.h"

FASTUNLEARN_DISPATCH(attention, AttentionArgs)
FASTUNLEARN_DISPATCH(attention_backward, AttentionArgs)

namespace fastunlearn {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

/// `[B, H, S, D]` in the type of `query`, with D side by side.
Heads checked_heads(const char* name, const Tensor& tensor, const Tensor& query, int64_t rows,
                    bool written = false) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected [B, H, S, D], got ", tensor.dim(), " dimensions");
  const int64_t sizes[4] = {query.size(0), query.size(1), rows, query.size(3)};
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(tensor.size(i) == sizes[i], name, ": expected size ", sizes[i], " in dimension ", i,
                    ", got ", tensor.size(i));
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), name, ": expected the type of query, ",
                  torch::headeronly::toString(query.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.size(3) == 1 || tensor.stride(3) == 1, name,
                  ": expected stride 1 in dimension 3, got ", tensor.stride(3));
  void* data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

AttentionArgs arguments(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && query.numel() > 0,
                  "query: expected [B, H, S, D] with at least one number");
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float,
                  "query: expected float16, bfloat16 or float32, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(key.dim() == 4 && key.size(2) > 0, "key: expected [B, H, S, D] with at least one row");
  AttentionArgs a{};
  a.type = static_cast<Type>(type);
  a.heads = query.size(1);
  a.num_queries = query.size(2);
  a.num_keys = key.size(2);
  a.depth = query.size(3);
  a.scale = static_cast<float>(scale);
  a.query = checked_heads("query", query, query, a.num_queries);
  a.key = checked_heads("key", key, query, a.num_keys);
  a.value = checked_heads("value", value, query, a.num_keys);
  return a;
}

void check_logsumexp(const Tensor& logsumexp, const Tensor& query) {
  bool same =
      logsumexp.dim() == 3 && logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_contiguous();
  for (int64_t i = 0; same && i < 3; ++i) same = logsumexp.size(i) == query.size(i);
  STD_TORCH_CHECK(same, "logsumexp: expected contiguous float32 [", query.size(0), ", ", query.size(1), ", ",
                  query.size(2), "]");
}

/// All heads. A thread that is held up by other processes takes fewer; no result depends on which thread
/// computes it.
template <class Kernel>
void run(const AttentionArgs& args, int64_t batch, bool backward, Kernel kernel) {
  const int64_t heads = batch * args.heads,
                workers = std::min<int64_t>(torch::stable::get_num_threads(), heads);
  const int64_t numbers = rounded_up(attention_scratch(args, backward), kMostLanes);
  const std::unique_ptr<float[], Release> scratch(
      static_cast<float*>(::operator new(workers * numbers * sizeof(float), kCacheLine)));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      AttentionArgs own = args;
      own.scratch = scratch.get() + worker * numbers;
      for (int64_t head; (head = next.fetch_add(1, std::memory_order_relaxed)) < heads;)
        kernel(own, head, head + 1);
    }
  });
}

void fill_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale, Tensor out,
                    Tensor logsumexp) {
  AttentionArgs args = arguments(query, key, value, scale);
  args.out = checked_heads("out", out, query, args.num_queries, true);
  check_logsumexp(logsumexp, query);
  args.logsumexp = logsumexp.mutable_data_ptr<float>();
  run(args, query.size(0), false, pick_attention());
}

void fill_attention_backward(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                             const Tensor& value, const Tensor& out, const Tensor& logsumexp, double scale,
                             Tensor grad_query, Tensor grad_key, Tensor grad_value) {
  AttentionArgs args = arguments(query, key, value, scale);
  args.grad_out = checked_heads("grad_out", grad_out, query, args.num_queries);
  args.out = checked_heads("out", out, query, args.num_queries);
  check_logsumexp(logsumexp, query);
  args.logsumexp = const_cast<float*>(logsumexp.const_data_ptr<float>());
  args.grad_query = checked_heads("grad_query", grad_query, query, args.num_queries, true);
  args.grad_key = checked_heads("grad_key", grad_key, query, args.num_keys, true);
  args.grad_value = checked_heads("grad_value", grad_value, query, args.num_keys, true);
  run(args, query.size(0), true, pick_attention_backward());
}

}  // namespace
}  // namespace fastunlearn

STABLE_TORCH_LIBRARY_IMPL(fastunlearn_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastunlearn::fill_attention));
  m.impl("attention_backward", TORCH_BOX(&fastunlearn::fill_attention_backward));
}
