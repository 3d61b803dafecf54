// What noising and mixture share: images read in blocks, noise given or made, results written in either
// memory layout.
#pragma once

#include "numeric.h"

namespace fastunlearn {

/// Stored images `[N, C, H, W]`; sample b is row `index[b]`, or row b without an index.
struct Rows {
  const void* data;
  Type type;
  const int64_t* index;
};

/// Noise `[B, C, H, W]`; without `data`, the Philox numbers of (seed, step, purpose) for rows first_row + b.
struct Noise {
  const void* data;
  Type type;
  uint64_t seed;
  uint32_t step, first_row, purpose;
};

/// Where results `[B, C, H, W]` go.
struct Output {
  void* data;
  Type type;
};

/// The extent of an image, and the memory layout of the results. What is read is always NCHW.
struct Extent {
  int64_t channels, pixels;
  bool channels_last;
};

}  // namespace fastunlearn

#ifdef FASTUNLEARN_ISA

#include "philox.h"

namespace fastunlearn::FASTUNLEARN_ISA {

constexpr int64_t kBlock = 1024;          // of 512 to 4096, the best compromise over shapes and layouts
constexpr int64_t kScratch = kBlock + 4;  // Philox numbers may begin up to three elements early

template <class Real>
constexpr Type kType = sizeof(Real) == sizeof(float) ? Type::kFloat : Type::kDouble;

/// Elements whose results lie next to each other, from element `place` of the image on: `channels` channels
/// from `channel` on, of `pixels` pixels from `pixel` on. Where results are NCHW, the whole image counts as
/// one channel.
struct Block {
  int64_t pixel, pixels, channel, channels, place, count;
  int64_t plane;  // elements of a channel of the image
};

/// Calls `run(const Block&)` for all blocks of an image.
template <class Run>
static inline void for_blocks(const Extent& extent, Run run) {
  const int64_t all = extent.channels_last ? extent.channels : 1;
  const int64_t plane = extent.channels * extent.pixels / all;
  const int64_t channels = all < kBlock ? all : kBlock;
  int64_t pixels = kBlock;  // then a power of two: whole counters of Philox
  while (pixels * channels > kBlock) pixels /= 2;
  for (int64_t pixel = 0; pixel < plane; pixel += pixels) {
    for (int64_t channel = 0; channel < all; channel += channels) {
      const int64_t wide = plane - pixel < pixels ? plane - pixel : pixels;
      const int64_t deep = all - channel < channels ? all - channel : channels;
      run(Block{pixel, wide, channel, deep, pixel * all + channel, wide * deep, plane});
    }
  }
}

/// out[Channels * i + c] = channels[c][i] for 3 or 4 channels: a constant number becomes shuffles, not single
/// stores.
template <int Channels, class Real>
static inline void interleave(const Real* const* channels, int64_t pixels, Real* out) {
  const Real *first = channels[0], *second = channels[1], *third = channels[2],
             *last = channels[Channels - 1];
#pragma omp simd
  for (int64_t i = 0; i < pixels; ++i) {
    out[Channels * i] = first[i];
    out[Channels * i + 1] = second[i];
    out[Channels * i + 2] = third[i];
    if constexpr (Channels == 4) out[Channels * i + 3] = last[i];
  }
}

/// The numbers of `block` in the order of the results. `fetch(start, count, scratch)` points to `count`
/// numbers of the image from element `start` (in CHW order) on; `scratch`, of kScratch numbers, is there for
/// it to use.
///
/// Inputs are interleaved rather than results, so that everything after this is dense: three times as fast as
/// strided stores into the outputs of mixture at 3x256x256.
template <class Real, class Fetch>
FASTUNLEARN_INLINE const Real* gather(const Block& block, Real* scratch, Fetch fetch) {
  const int64_t start = block.channel * block.plane + block.pixel;
  if (block.channels == 1) return fetch(start, block.pixels, scratch);
  alignas(64) Real planar[4][kBlock / 2 + 4];  // at least two channels share a block
  const Real* channels[4];
  const bool few = block.channels == 3 || block.channels == 4;
  for (int64_t c = 0; c < block.channels; ++c) {
    const Real* channel = fetch(start + c * block.plane, block.pixels, planar[few ? c : 0]);
    if (few) {
      channels[c] = channel;
    } else {
      for (int64_t i = 0; i < block.pixels; ++i) scratch[i * block.channels + c] = channel[i];
    }
  }
  if (block.channels == 3) interleave<3>(channels, block.pixels, scratch);
  if (block.channels == 4) interleave<4>(channels, block.pixels, scratch);
  return scratch;
}

/// `count` stored numbers from element `start` on: where they are if they are stored as `Real`, else in
/// `scratch`.
template <class Real>
static inline const Real* read(const void* data, Type type, int64_t start, int64_t count, Real* scratch) {
  if (type == kType<Real>) return static_cast<const Real*>(data) + start;
  with_row_type(type, [&](auto* tag) {
    load(static_cast<decltype(tag)>(const_cast<void*>(data)) + start, count, scratch);
  });
  return scratch;
}

/// Normal numbers of elements [start, start + count) of sample `b`, in `scratch`.
template <class Real>
static inline const Real* make_noise(const Noise& noise, int64_t b, int64_t start, int64_t count,
                                     Real* scratch) {
  const int64_t before = start % 4;  // a channel may begin amid the four elements of a counter
  const uint32_t row = noise.first_row + static_cast<uint32_t>(b);
  if constexpr (kType<Real> == Type::kFloat) {
    normals(noise.seed, row, noise.step, noise.purpose, start - before, before + count, scratch);
  } else {
    float single[kScratch];
    normals(noise.seed, row, noise.step, noise.purpose, start - before, before + count, single);
    load(single, before + count, scratch);
  }
  return scratch + before;
}

/// The elements of `block` of sample `b`; `scratch` holds kScratch numbers.
template <class Real>
static inline const Real* read_row(const Rows& rows, int64_t elements, int64_t b, const Block& block,
                                   Real* scratch) {
  const int64_t row = rows.index == nullptr ? b : rows.index[b];
  return gather(block, scratch, [&](int64_t start, int64_t count, Real* own) {
    return read(rows.data, rows.type, row * elements + start, count, own);
  });
}

/// The noise of `block` of sample `b`; `scratch` holds kScratch numbers.
template <class Real>
static inline const Real* read_noise(const Noise& noise, int64_t elements, int64_t b, const Block& block,
                                     Real* scratch) {
  return gather(block, scratch, [&](int64_t start, int64_t count, Real* own) {
    return noise.data == nullptr ? make_noise(noise, b, start, count, own)
                                 : read(noise.data, noise.type, b * elements + start, count, own);
  });
}

/// Writes `number(i)` for the elements of `block` of sample `b`, rounded to the type of `output`.
template <class Real, class Number>
FASTUNLEARN_INLINE void write(const Output& output, int64_t elements, int64_t b, const Block& block,
                              Number number) {
  const int64_t first = b * elements + block.place;
  Real scratch[kBlock];
  Real* out = output.type == kType<Real> ? static_cast<Real*>(output.data) + first : scratch;
#pragma omp simd
  for (int64_t i = 0; i < block.count; ++i) out[i] = number(i);
  if (out == scratch) store(scratch, block.count, output.type, output.data, first, 1);
}

}  // namespace fastunlearn::FASTUNLEARN_ISA

#endif  // FASTUNLEARN_ISA
