// A block's way over the tiles of a span, and a tile's way into registers and back: 512 threads
// take four 16-byte vectors each, so that 32 KiB are in flight before the first is used.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <bit>
#include <tuple>

#include "partition.h"

namespace fastclip::cuda {

using Vector = std::array<uint32_t, 4>;
constexpr int kVector = sizeof(Vector);
constexpr int kVectors = kTileBytes / (kThreads * kVector);

struct Tile {
  char* data;
  int bytes;
  Dtype dtype;
  int slot;

  // Where vector j of this thread begins; a uint4 only if aligned and all there.
  __device__ int offset(int j) const { return (j * kThreads + threadIdx.x) * kVector; }
  __device__ uint4* at(int j) const { return reinterpret_cast<uint4*>(data + offset(j)); }
  __device__ bool aligned() const { return reinterpret_cast<uintptr_t>(data) % kVector == 0; }
};

// Calls visit(Tile) for every tile of a span, by all threads of a block.
template <bool kDescending, class Table, class Visit>
__device__ void for_each_tile(const Table& table, int span, Visit&& visit) {
  const int begin = span * table.span_tiles;
  const int end = min(begin + table.span_tiles, table.tiles());
  int tile = kDescending ? end - 1 : begin;
  int i = 0;
  for (int high = table.count; high - i > 1;) {
    const int middle = (i + high) / 2;
    (table.entries[middle].first_tile <= tile ? i : high) = middle;
  }
  for (int left = end - begin; left > 0; --left, tile += kDescending ? -1 : 1) {
    while (tile < table.entries[i].first_tile) --i;
    while (tile >= table.entries[i + 1].first_tile) ++i;
    const Entry& entry = table.entries[i];
    if (entry.data == nullptr) continue;
    const bool last = tile + 1 == table.entries[i + 1].first_tile;
    visit(Tile{entry.data + static_cast<int64_t>(tile - entry.first_tile) * kTileBytes,
               last ? 2 * (static_cast<int>(entry.tail) + 1) : kTileBytes,
               static_cast<Dtype>(entry.dtype), static_cast<int>(entry.slot)});
  }
}

// Up to 16 bytes between memory and a vector, in words of `word_t`. These go through the L1 cache,
// which several loads of one line need.
template <bool kStore, class word_t>
__device__ void copy_words(word_t* memory, int left, Vector& vector) {
  constexpr int kBits = 8 * sizeof(word_t);
  for (int k = 0; k < 128 / kBits; ++k) {
    if ((k + 1) * kBits > 8 * left) break;
    uint32_t& whole = vector[k * kBits / 32];
    if constexpr (kStore)
      memory[k] = static_cast<word_t>(whole >> k * kBits % 32);
    else
      whole |= static_cast<uint32_t>(memory[k]) << k * kBits % 32;
  }
}

// This thread's vector j, as far as it lies in the tile; a load finds zeros beyond.
template <bool kStore>
__device__ void copy_vector(const Tile& tile, int j, Vector& vector) {
  const int left = tile.bytes - tile.offset(j);
  if (tile.aligned() && left >= kVector) {
    if constexpr (kStore)
      *tile.at(j) = std::bit_cast<uint4>(vector);
    else
      vector = std::bit_cast<Vector>(__ldcg(tile.at(j)));
  } else if ((reinterpret_cast<uintptr_t>(tile.data) | left) % 4 == 0) {
    copy_words<kStore>(reinterpret_cast<uint32_t*>(tile.at(j)), left, vector);
  } else {
    copy_words<kStore>(reinterpret_cast<uint16_t*>(tile.at(j)), left, vector);
  }
}

// What lies in memory, and what it is computed with.
template <Dtype dtype>
using stored_type = std::tuple_element_t<static_cast<size_t>(dtype),
                                         std::tuple<float, __nv_bfloat16, __half, double>>;
template <Dtype dtype>
using acc_type = std::conditional_t<dtype == Dtype::kDouble, double, float>;
template <Dtype dtype>
constexpr int kElements = kVector / sizeof(stored_type<dtype>);
template <Dtype dtype>
using Stored = std::array<stored_type<dtype>, kElements<dtype>>;
template <Dtype dtype>
using Values = acc_type<dtype>[kElements<dtype>];

template <Dtype dtype>
__device__ void decode(const Vector& vector, Values<dtype>& values) {
  const auto stored = std::bit_cast<Stored<dtype>>(vector);
  for (int k = 0; k < kElements<dtype>; ++k) values[k] = static_cast<acc_type<dtype>>(stored[k]);
}

// Rounds to nearest even.
template <Dtype dtype>
__device__ Vector encode(const Values<dtype>& values) {
  Stored<dtype> stored;
  for (int k = 0; k < kElements<dtype>; ++k) stored[k] = static_cast<stored_type<dtype>>(values[k]);
  return std::bit_cast<Vector>(stored);
}

// Calls visit.template operator()<option>() for the option that `which` is.
template <auto... options, class Which, class Visit>
__host__ __device__ void pick(Which which, Visit&& visit) {
  ((which == options && (visit.template operator()<options>(), true)) || ...);
}

// Calls visit.template operator()<dtype>(vectors, j) with this thread's vectors of a tile in order,
// from j on: of a whole aligned tile all at once, requested before the first is used, otherwise one
// at a time. Which elements a thread takes does not depend on the alignment, see Note [partition].
template <class Visit>
__device__ void for_vectors(const Tile& tile, Visit&& visit) {
  const auto visit_as_dtype = [&](const auto& vectors, int j) {
    pick<Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf, Dtype::kDouble>(
        tile.dtype, [&]<Dtype dtype>() { visit.template operator()<dtype>(vectors, j); });
  };
  if (tile.aligned() && tile.bytes == kTileBytes) {
    Vector vectors[kVectors];
    for (int j = 0; j < kVectors; ++j) vectors[j] = std::bit_cast<Vector>(__ldcg(tile.at(j)));
    visit_as_dtype(vectors, 0);
  } else {
#pragma unroll 1
    for (int j = 0; j < kVectors; ++j) {
      Vector vectors[1] = {};
      copy_vector<false>(tile, j, vectors[0]);
      visit_as_dtype(vectors, j);
    }
  }
}

}  // namespace fastclip::cuda
