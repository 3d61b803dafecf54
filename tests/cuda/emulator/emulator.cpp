// Fibers, barriers and the tensor core of emulator.h, and the kernels themselves.
#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "lowpass_residual.cuh"

Index blockIdx, blockDim;

namespace fastunlearn_lowpass {
alignas(16) float lowpass_shared[emulator::kShared / sizeof(float)];
}

namespace emulator {
namespace {

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Lane {  // what a thread brings to its warp, and what it takes away
  unsigned a[4], b[2];
  float d[4], shuffled;
};

struct Fiber : Thread {
  State state;
  bool started;
  jmp_buf jump;
  ucontext_t context;
  Lane lane;
};

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 128 * 1024;
Fiber fibers[kMaxThreads];
jmp_buf scheduler;
int waiting[kMaxThreads / kWarp];  // lanes of a warp
char operation[kMaxThreads / kWarp];
Kernel entry;
const fastunlearn_lowpass::Arguments* entry_arguments;

Fiber* self() { return static_cast<Fiber*>(thread); }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x,
               thread ? thread->index.x : 0);
  std::_Exit(4);
}

void yield(State state) {
  self()->state = state;
  if (_setjmp(self()->jump) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  entry(*entry_arguments);
  self()->state = kDone;
  _longjmp(scheduler, 1);
}

// Waits until all 32 lanes are here, the last of which runs `work` for all.
template <class Work>
void with_warp(char name, const Work& work) {
  const int warp = thread->index.x / kWarp;
  if (waiting[warp] > 0 && operation[warp] != name) fail("the lanes of a warp do different things");
  operation[warp] = name;
  if (++waiting[warp] < kWarp) return yield(kAtWarp);
  waiting[warp] = 0;
  work(fibers + warp * kWarp);
  for (int i = 0; i < kWarp; ++i) fibers[warp * kWarp + i].state = kReady;
}

double tf32(unsigned word) { return bits<float>(word & 0xffffe000u); }

float truncated(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.f) : nearest;
}

void multiply_fragments(Fiber* lanes) {
  double a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; ++e) a[g + 8 * (e % 2)][t + 4 * (e / 2)] = tf32(lanes[lane].lane.a[e]);
    for (int e = 0; e < 2; ++e) b[t + 4 * e][g] = tf32(lanes[lane].lane.b[e]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
      double sum = lanes[lane].lane.d[e];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].lane.d[e] = truncated(sum);
    }
  }
}

void start(Fiber& fiber, char* stack) {
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack, 0, kStack};
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}

// Runs a fiber until it waits or ends.
void resume(Fiber& fiber, char* stack) {
  thread = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  start(fiber, stack);
}

// Runs the fibers of `turn` that can run, once each; false where none can.
bool sweep(const int* turn, int count, char* stacks) {
  bool progress = false;
  for (int i = 0; i < count; ++i) {
    if (fibers[turn[i]].state != kReady) continue;
    progress = true;
    resume(fibers[turn[i]], stacks + turn[i] * kStack);
  }
  return progress;
}

void run_block(int threads, char* stacks, Order order, std::minstd_rand& random) {
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; ++i) {
    turn[i] = order == kBackward ? threads - 1 - i : i;
    fibers[i].index.x = i;
    fibers[i].state = kReady;
    fibers[i].started = false;
  }
  std::fill(waiting, waiting + kMaxThreads / kWarp, 0);
  const auto all = [&](State state) {
    return std::all_of(fibers, fibers + threads,
                       [state](const Fiber& fiber) { return fiber.state == state; });
  };
  while (!all(kDone)) {
    if (order == kShuffled) {
      do std::shuffle(turn.begin(), turn.end(), random);
      while (sweep(turn.data(), threads, stacks));
    } else {  // a warp runs as far as it can before the next one starts
      for (int first = 0; first < threads; first += kWarp) {
        while (sweep(turn.data() + first, kWarp, stacks)) continue;
      }
    }
    if (all(kDone)) return;
    if (!all(kAtBlock)) fail("a barrier that not all threads reach");
    for (int i = 0; i < threads; ++i) fibers[i].state = kReady;
  }
}

}  // namespace

Thread* thread = nullptr;

void wait_for_block() { yield(kAtBlock); }

void tensor_core(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Lane& lane = self()->lane;
  std::copy(a, a + 4, lane.a);
  std::copy(b, b + 2, lane.b);
  std::copy(d, d + 4, lane.d);
  with_warp('m', multiply_fragments);
  std::copy(self()->lane.d, self()->lane.d + 4, d);
}

float shuffle_xor(float value, int mask) {
  self()->lane.d[0] = value;
  with_warp('s', [mask](Fiber* lanes) {
    for (int i = 0; i < kWarp; ++i) lanes[i].lane.shuffled = lanes[i ^ mask].lane.d[0];
  });
  return self()->lane.shuffled;
}

void launch(Kernel kernel, const fastunlearn_lowpass::Step& step,
            const fastunlearn_lowpass::Arguments& arguments, Order order) {
  static char* stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static std::minstd_rand random(1);
  entry = kernel;
  entry_arguments = &arguments;
  blockDim.x = step.threads;
  for (long long block = 0; block < step.blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    std::memset(fastunlearn_lowpass::lowpass_shared, 0xff, kShared);  // NaN
    run_block(step.threads, stacks, order, random);
    const char* shared = reinterpret_cast<const char*>(fastunlearn_lowpass::lowpass_shared);
    for (int i = step.shared; i < kShared; ++i) {
      if (shared[i] != static_cast<char>(0xff)) fail("a write beyond the shared memory of the launch");
    }
  }
}

// In the order of fastunlearn_lowpass::Kernel.
const Kernel kernels[fastunlearn_lowpass::kKernels] = {
    lowpass_plane,
    lowpass_analysis_5,
    lowpass_analysis_9,
    lowpass_analysis_17,
    lowpass_synthesis_5,
    lowpass_synthesis_9,
    lowpass_synthesis_17,
    lowpass_synthesis_residual_5,
    lowpass_synthesis_residual_9,
    lowpass_synthesis_residual_17,
    lowpass_select,
    lowpass_energy,
};

}  // namespace emulator
