// Runs lowpass_residual under the emulator.
//   emulator run <order> <place>   one case: a Case and its tensors on stdin, energy and gradient on stdout
//   emulator fault <order> <name>  a kernel of faults.h on 64 floats; prints energy[0]
//   emulator plan                  Cases on stdin; for each a line: the fields that make_plan fills, steps
// <place> end: tensors end where readable memory ends; start: they begin where it begins. Touching anything
// else is a fault (exit status 3).
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "faults.h"
#include "fibers.h"

namespace {

using fastunlearn_lowpass::Arguments;

struct Case {  // as tests/cuda/emulated.py packs it
  int32_t batch, channels, height, width, row_frequencies, column_frequencies, prediction_type, target_type,
      weight_is_double;
  int32_t prediction_stride, target_stride;
  float inside, outside;
};

int bytes_of(int type) { return type == fastunlearn_lowpass::kFloat32 ? 4 : 2; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::exit(2);
}

void on_fault(int signal) {
  const char text[] = "emulator: an access outside a tensor, or a misaligned one\n";
  (void)!write(2, text, sizeof(text) - 1);
  _exit(signal == SIGILL ? 5 : 3);
}

void read_exactly(void* data, size_t bytes) {
  if (std::fread(data, 1, bytes, stdin) != bytes) fail("not enough input");
}

class Memory {
 public:
  Memory(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    size_ = (bytes + page - 1) / page * page;
    char* base =
        static_cast<char*>(mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    begin_ = base + page;
    if (size_ > 0) mprotect(begin_, size_, PROT_READ | PROT_WRITE);
    std::memset(begin_, 0xff, size_);  // NaN, whatever the type
    data = begin_ + (at_end ? size_ - bytes : 0);
  }

  // Fills it from stdin.
  const char* input() {
    read_exactly(data, bytes_);
    return protect();
  }

  // From here on it cannot be written.
  const char* protect() {
    if (size_ > 0) mprotect(begin_, size_, PROT_READ);
    return data;
  }

  void output() const { std::fwrite(data, 1, bytes_, stdout); }

  char* data;

 private:
  char* begin_;
  size_t bytes_, size_;
};

Arguments arguments_of(const Case& c) {
  Arguments a = {};
  a.batch = c.batch;
  a.channels = c.channels;
  a.height = c.height;
  a.width = c.width;
  a.row_frequencies = c.row_frequencies;
  a.column_frequencies = c.column_frequencies;
  a.row_columns = std::min(2 * c.row_frequencies - 1, c.height);
  a.column_columns = std::min(2 * c.column_frequencies - 1, c.width);
  a.prediction_type = c.prediction_type;
  a.target_type = c.target_type;
  a.weight_is_double = c.weight_is_double;
  a.prediction_stride = c.prediction_stride;
  a.target_stride = c.target_stride;
  a.gradient_stride = static_cast<long long>(c.channels) * c.height * c.width;
  a.inside = c.inside;
  a.outside = c.outside;
  return a;
}

void run(emulator::Order order, bool at_end) {
  Case c;
  read_exactly(&c, sizeof(c));
  Arguments a = arguments_of(c);
  const long long sample = a.gradient_stride;
  const auto strided = [&](long long stride) { return a.batch > 0 ? (a.batch - 1) * stride + sample : 0; };
  Memory prediction(strided(a.prediction_stride) * bytes_of(a.prediction_type), at_end),
      target(strided(a.target_stride) * bytes_of(a.target_type), at_end);
  Memory weight(a.batch * (a.weight_is_double ? 8 : 4), at_end),
      band(4ll * a.row_frequencies * a.column_frequencies, at_end);
  Memory row_basis(4ll * a.height * a.row_columns, at_end),
      column_basis(4ll * a.width * a.column_columns, at_end);
  Memory energy(4ll * a.batch, at_end), gradient(a.batch * sample * bytes_of(a.prediction_type), at_end);
  a.prediction = prediction.input();
  a.target = target.input();
  a.weight = weight.input();
  a.band = reinterpret_cast<const float*>(band.input());
  a.row_basis = reinterpret_cast<const float*>(row_basis.input());
  a.column_basis = reinterpret_cast<const float*>(column_basis.input());
  a.energy = reinterpret_cast<float*>(energy.data);
  a.gradient = gradient.data;
  const fastunlearn_lowpass::Plan plan = fastunlearn_lowpass::make_plan(a);
  Memory coefficients(4 * plan.coefficients, at_end), partials(4 * plan.partials, at_end);
  a.coefficients = reinterpret_cast<float*>(coefficients.data);
  a.partials = reinterpret_cast<float*>(partials.data);
  for (int i = 0; i < plan.count; ++i)
    emulator::launch(emulator::kernels[plan.steps[i].kernel], plan.steps[i], a, order);
  energy.output();
  gradient.output();
}

void run_fault(const char* name, emulator::Order order) {
  Memory band(4 * 64, true), energy(4, true);
  Arguments a = {};
  a.band = reinterpret_cast<const float*>(band.protect());
  a.energy = reinterpret_cast<float*>(energy.data);
  if (!faults::run(name, a, order)) fail("no such fault");
}

void print_plans() {
  for (Case c; std::fread(&c, sizeof(c), 1, stdin) == 1;) {
    Arguments a = arguments_of(c);
    const fastunlearn_lowpass::Plan plan = fastunlearn_lowpass::make_plan(a);
    std::printf("%d %d %d %d %d %d %d %lld %lld", a.vector, a.splits, a.panels, a.panel_frequencies,
                a.selects, a.terms, a.planes_per_block, plan.coefficients, plan.partials);
    for (int i = 0; i < plan.count; ++i) {
      const fastunlearn_lowpass::Step& step = plan.steps[i];
      std::printf(" %d %lld %d %d", step.kernel, step.blocks, step.threads, step.shared);
    }
    std::printf("\n");
  }
}

}  // namespace

int main(int count, char** words) {
  const std::string mode = count > 1 ? words[1] : "", order = count > 2 ? words[2] : "",
                    place = count > 3 ? words[3] : "";
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) ::signal(signal, on_fault);
  const emulator::Order chosen = order == "backward"   ? emulator::kBackward
                                 : order == "shuffled" ? emulator::kShuffled
                                                       : emulator::kForward;
  if (mode == "plan") {
    print_plans();
  } else if (mode == "run" && (place == "start" || place == "end")) {
    run(chosen, place == "end");
  } else if (mode == "fault") {
    run_fault(place.c_str(), chosen);
  } else {
    fail(
        "expected: run <order> start|end, fault <order> <name>, or plan; <order>: forward, backward, "
        "shuffled");
  }
}
