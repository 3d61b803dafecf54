// Exact squared distances of uint8 rows, all queries against all rows, and the k smallest of each query.
//
// ||q - r||^2 = (||q||^2 - 256 sum q) + ||r||^2 - 2 <q, r - 128>: the product has a u8 and an s8 side, for
// VNNI. Columns go in chunks whose products fit an int32 with room to spare; several chunks are summed in
// int64. A tile is kRows rows by kLanes queries. It does not leave the first cache level: there its distances
// are compared with one that each query has k neighbours within, and rarely does one pass.
#pragma once
#include <cstdint>
#include <cstring>

#include "sqdist_products.h"

namespace fastunlearn {

constexpr int64_t kMostBlockRows = 480;
constexpr int64_t kPanelsInPass = 64;  // bounds `sums`

struct Neighbor {
  int64_t distance, row;
};

struct SqdistArgs {
  const uint8_t *queries, *rows;     // [num_queries, columns], [num_rows, columns]
  int64_t query_stride, row_stride;  // bytes from row to row
  int64_t num_queries, num_rows, columns;
  // How the work is cut (`plan`)
  bool vnni;                      // the processor multiplies u8 by s8 with int32 sums
  int64_t width, chunks, panels;  // columns of a chunk, a multiple of 16; chunks; groups of kLanes queries
  int64_t block_rows;  // rows in the second cache level while all panels pass by; a multiple of kRows
  // The queries as `sqdist_pack` lays them out
  void* packed;          // [chunks, panels, a panel of kLanes * width elements]
  int64_t* query_terms;  // [panels * kLanes]: ||q||^2 - 256 sum q
  // Scratch of one thread
  void* block;         // [block_rows / kRows, a group of kRows * width elements]
  int64_t* row_terms;  // [block_rows]: ||r||^2
  int64_t* sums;       // [min(panels, kPanelsInPass), block_rows, kLanes], for several chunks
  // What to do with the distances: with k = 0 all are written, else each thread finds the k smallest
  int64_t* distances;    // [num_queries, num_rows]
  int64_t k, first_row;  // the number of row 0
  Neighbor* found;       // [num_queries, 2 k]: the k smallest are among the first `count`
  int64_t* count;        // [num_queries]
  int64_t* limits;       // [panels * kLanes]: only distances less than limit + query term can be among them
  void (*keep_smallest)(Neighbor* found,
                        int64_t k);  // puts the k smallest of 2 k first, the largest of them last
};

// An element is a byte with VNNI, else an int16.
static inline void plan(SqdistArgs& a, bool vnni) {
  const int64_t most =
      vnni ? 4096 : 1024;  // 1024: for the first cache level; VNNI is as fast from the second
  a.vnni = vnni;
  a.chunks = (a.columns + most - 1) / most;
  a.width = ((a.columns + a.chunks - 1) / a.chunks + 15) / 16 * 16;
  a.panels = (a.num_queries + kLanes - 1) / kLanes;
  const int64_t groups = (int64_t{1} << 18) / (a.width * (vnni ? 1 : 2)) / kRows;
  a.block_rows = kRows * (groups < 1 ? 1 : groups > kMostBlockRows / kRows ? kMostBlockRows / kRows : groups);
}

#ifdef FASTUNLEARN_ISA
namespace FASTUNLEARN_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- packing

// Four rows, less 128, for VNNI, from the front in steps of 16 columns. Returns how many columns are done.
int64_t pack_four_rows(const uint8_t* row, int64_t stride, int64_t columns, uint8_t* fours) {
  int64_t j = 0;
#ifdef __AVX2__
  const auto load = [](const uint8_t* from) {
    return _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), _mm_set1_epi8(-128));
  };
  const auto store = [](uint8_t* to, __m128i value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
  };
  for (; j + 16 <= columns; j += 16, row += 16, fours += 16 * kRows) {  // 4 x 4 words, transposed
    const __m128i r0 = load(row), r1 = load(row + stride), r2 = load(row + 2 * stride),
                  r3 = load(row + 3 * stride);
    const __m128i low01 = _mm_unpacklo_epi32(r0, r1), low23 = _mm_unpacklo_epi32(r2, r3);
    const __m128i high01 = _mm_unpackhi_epi32(r0, r1), high23 = _mm_unpackhi_epi32(r2, r3);
    store(fours, _mm_unpacklo_epi64(low01, low23));
    store(fours + 4 * kRows, _mm_unpackhi_epi64(low01, low23));
    store(fours + 8 * kRows, _mm_unpacklo_epi64(high01, high23));
    store(fours + 12 * kRows, _mm_unpackhi_epi64(high01, high23));
  }
#endif
  return j;
}

// `columns` bytes, less `zero`, as row `i` of a group or panel of `height` rows, zeros up to `width`; `done`
// are there.
void pack(const SqdistArgs& a, const uint8_t* row, int64_t done, int64_t columns, int64_t i, int64_t height,
          uint8_t zero, void* out) {
  if (!a.vnni) {
    int16_t* elements = static_cast<int16_t*>(out) + i * a.width;
    for (int64_t j = 0; j < columns; ++j) elements[j] = static_cast<int16_t>(row[j] - zero);
    std::memset(elements + columns, 0, (a.width - columns) * sizeof(int16_t));
    return;
  }
  uint8_t* fours = static_cast<uint8_t*>(out) + 4 * i + done * height;
  const uint32_t flip = zero * 0x01010101u;  // 0 or 128: subtracted from a byte by flipping its top bit
  int64_t j = done;
  for (; j + 4 <= columns; j += 4, fours += 4 * height) {
    uint32_t four;
    std::memcpy(&four, row + j, 4);
    four ^= flip;
    std::memcpy(fours, &four, 4);
  }
  for (; j < a.width; j += 4, fours += 4 * height)
    for (int64_t byte = 0; byte < 4; ++byte) fours[byte] = j + byte < columns ? row[j + byte] ^ zero : 0;
}

// One chunk of rows [begin, end) into `block`, in whole groups: rows that are none lie beyond all distances.
void pack_rows(const SqdistArgs& a, int64_t begin, int64_t end, int64_t chunk) {
  const int64_t from = chunk * a.width, columns = smaller(a.width, a.columns - from);
  const int64_t bytes = a.width * (a.vnni ? 1 : 2);
  int64_t done = 0;
  for (int64_t r = 0; r < a.block_rows && (r < end - begin || r % kRows != 0); ++r) {
    const bool none = r >= end - begin;
    const uint8_t* row = a.rows + (begin + r) * a.row_stride + from;
    int32_t term = none ? int32_t{1} << 30 : 0;
    for (int64_t j = 0; j < (none ? 0 : columns); ++j) term += row[j] * row[j];
    a.row_terms[r] += term;
    uint8_t* group = static_cast<uint8_t*>(a.block) + r / kRows * kRows * bytes;
    const bool four = a.vnni && r + 4 <= end - begin;
    if (r % 4 == 0) done = four ? pack_four_rows(row, a.row_stride, columns, group + r % kRows * 4) : 0;
    pack(a, row, done, none ? 0 : columns, r % kRows, kRows, 128, group);
  }
}

// The queries of one panel, with zeros for those that are none, and their terms.
void pack_panel(const SqdistArgs& a, int64_t panel) {
  const int64_t bytes = kLanes * a.width * (a.vnni ? 1 : 2);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t q = panel * kLanes + lane;
    a.query_terms[q] = 0;
    for (int64_t c = 0; c < a.chunks; ++c) {
      const int64_t columns = q < a.num_queries ? smaller(a.width, a.columns - c * a.width) : 0;
      const uint8_t* query = a.queries + q * a.query_stride + c * a.width;
      int32_t term = 0;
      for (int64_t j = 0; j < columns; ++j) term += query[j] * (query[j] - 256);
      a.query_terms[q] += term;
      pack(a, query, 0, columns, lane, kLanes, 0,
           static_cast<char*>(a.packed) + (c * a.panels + panel) * bytes);
    }
  }
}

// --- what becomes of a tile of products [kRows][kLanes]

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

// Rows come in ascending order, so one at the limit comes after all that are within.
template <class T>
void keep_nearest(const SqdistArgs& a, const T* products, int64_t first_row, int64_t rows, const T* terms,
                  int64_t panel) {
  typename Vector<T>::type smallest, value;
  std::memcpy(&smallest, products, sizeof(smallest));
  smallest = terms[0] - 2 * smallest;
#pragma GCC unroll 24
  for (int64_t i = 1; i < kRows; ++i) {
    std::memcpy(&value, products + i * kLanes, sizeof(value));
    value = terms[i] - 2 * value;
    smallest = value < smallest ? value : smallest;
  }
  T nearest[kLanes];
  std::memcpy(nearest, &smallest, sizeof(nearest));
  int64_t* limits = a.limits + panel * kLanes;
  bool passes = false;
  for (int64_t lane = 0; lane < kLanes; ++lane) passes |= nearest[lane] < limits[lane];
  if (!passes) return;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (nearest[lane] >= limits[lane]) continue;
    const int64_t q = panel * kLanes + lane;
    Neighbor* found = a.found + q * 2 * a.k;
    for (int64_t i = 0; i < rows; ++i) {
      const T value = terms[i] - 2 * products[i * kLanes + lane];
      if (value >= limits[lane]) continue;
      found[a.count[q]++] = {value + a.query_terms[q], first_row + i};
      if (a.count[q] < 2 * a.k) continue;
      a.keep_smallest(found, a.k);
      a.count[q] = a.k;
      limits[lane] = found[a.k - 1].distance - a.query_terms[q];
    }
  }
}

template <class T>
void write_distances(const SqdistArgs& a, const T* products, int64_t first_row, int64_t rows, const T* terms,
                     int64_t panel) {
  const int64_t lanes = smaller(kLanes, a.num_queries - panel * kLanes);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t q = panel * kLanes + lane;
    int64_t* out = a.distances + q * a.num_rows + first_row;
    for (int64_t i = 0; i < rows; ++i)
      out[i] = a.query_terms[q] + (terms[i] - 2 * products[i * kLanes + lane]);
  }
}

template <class T>
void use_tile(const SqdistArgs& a, const T* products, int64_t first_row, int64_t rows, const T* terms,
              int64_t panel) {
  if (a.k > 0)
    keep_nearest(a, products, a.first_row + first_row, rows, terms, panel);
  else
    write_distances(a, products, first_row, rows, terms, panel);
}

}  // namespace

// Panels [begin, end) of the queries, and their terms.
void sqdist_pack(const SqdistArgs& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) pack_panel(a, panel);
}

// Rows [begin, end), at most `block_rows` of them, in one thread.
void sqdist(const SqdistArgs& a, int64_t begin, int64_t end) {
  alignas(64) int32_t tile[kRows * kLanes];
  int32_t terms[kMostBlockRows];  // `row_terms`, where one chunk is all
  const int64_t bytes = a.width * (a.vnni ? 1 : 2), panels_in_pass = a.chunks == 1 ? a.panels : kPanelsInPass;
  const auto products = a.vnni ? products_vnni : products_int16;
  for (int64_t first = 0; first < a.panels; first += panels_in_pass) {
    const int64_t last = smaller(first + panels_in_pass, a.panels);
    std::memset(a.row_terms, 0, a.block_rows * sizeof(int64_t));
    for (int64_t c = 0; c < a.chunks; ++c) {
      pack_rows(a, begin, end, c);
      for (int64_t r = 0; a.chunks == 1 && r < a.block_rows; ++r)
        terms[r] = static_cast<int32_t>(a.row_terms[r]);
      for (int64_t panel = first; panel < last; ++panel) {
        const char* packed = static_cast<const char*>(a.packed) + (c * a.panels + panel) * kLanes * bytes;
        for (int64_t r = 0; r < end - begin; r += kRows) {
          products(static_cast<const char*>(a.block) + r * bytes, packed, a.width, tile);
          const int64_t rows = smaller(kRows, end - begin - r);
          if (a.chunks == 1) {
            use_tile(a, tile, begin + r, rows, terms + r, panel);
            continue;
          }
          int64_t* sums = a.sums + ((panel - first) * a.block_rows + r) * kLanes;
          if (c == 0) std::memset(sums, 0, kRows * kLanes * sizeof(int64_t));
          for (int64_t i = 0; i < kRows * kLanes; ++i) sums[i] += tile[i];
          if (c + 1 == a.chunks) use_tile(a, sums, begin + r, rows, a.row_terms + r, panel);
        }
      }
    }
  }
}

}  // namespace FASTUNLEARN_ISA
#endif
}  // namespace fastunlearn
