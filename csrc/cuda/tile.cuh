// How a block visits the tiles of a span, and loads and stores the vectors of a tile. Each of 512
// threads loads four 16-byte vectors before it uses the first, so that a block has 32 KiB of loads
// in flight. These numbers follow from kThreads and kTileBytes of partition.h.
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
  int group;

  // Where vector j of this thread begins, and how many bytes of the tile are left from there.
  __device__ int offset(int j) const { return (j * kThreads + threadIdx.x) * kVector; }
  __device__ int left(int j) const { return bytes - offset(j); }
  __device__ uint4* at(int j) const { return reinterpret_cast<uint4*>(data + offset(j)); }
  __device__ bool aligned() const { return reinterpret_cast<uintptr_t>(data) % kVector == 0; }
};

// Calls visit(Tile) for every tile of a span. All threads of a block must call this.
template <bool kDescending, class Table, class Visit>
__device__ void for_each_tile(const Table& table, int span, Visit&& visit) {
  constexpr int kStep = kDescending ? -1 : 1;
  const int begin = span * table.span_tiles;
  const int end = min(begin + table.span_tiles, table.tiles());
  int tile = kDescending ? end - 1 : begin;
  int i = 0;
  for (int high = table.count; high - i > 1;) {
    const int middle = (i + high) / 2;
    (table.entries[middle].first_tile() <= tile ? i : high) = middle;
  }
  for (int left = end - begin; left > 0; --left, tile += kStep) {
    while (kDescending && tile < table.entries[i].first_tile()) --i;
    while (!kDescending && tile >= table.entries[i + 1].first_tile()) ++i;
    const Entry& entry = table.entries[i];
    if (entry.is_hole()) return;  // only norms have holes, and go upwards: it ends the span
    const bool last = tile + 1 == table.entries[i + 1].first_tile();
    visit(Tile{entry.data + static_cast<int64_t>(tile - entry.first_tile()) * kTileBytes,
               last ? entry.last_bytes() : kTileBytes, entry.dtype(), entry.group()});
  }
}

// Stores or loads the part of this thread's vector j that lies in the tile; loads give zeros beyond
// the tile's end. Not inlined: this rare path would take registers from the common one.
template <bool kStore>
__device__ __attribute__((noinline)) Vector copy_vector(const Tile tile, int j, Vector vector) {
  const int left = tile.left(j);
  const auto copy_words = [&]<class word_t>(word_t* memory) {
    constexpr int kBits = 8 * sizeof(word_t);
    for (int k = 0; k < 128 / kBits && (k + 1) * kBits <= 8 * left; ++k) {
      uint32_t& whole = vector[k * kBits / 32];
      if constexpr (kStore)
        memory[k] = static_cast<word_t>(whole >> k * kBits % 32);
      else
        whole |= static_cast<uint32_t>(memory[k]) << k * kBits % 32;
    }
  };
  if (tile.aligned() && left >= kVector) {
    if constexpr (kStore)
      *tile.at(j) = std::bit_cast<uint4>(vector);
    else
      vector = std::bit_cast<Vector>(__ldcg(tile.at(j)));
  } else if ((reinterpret_cast<uintptr_t>(tile.data) | left) % 4 == 0) {
    copy_words(reinterpret_cast<uint32_t*>(tile.at(j)));
  } else {
    copy_words(reinterpret_cast<uint16_t*>(tile.at(j)));
  }
  return vector;
}

// The type of an element in memory, and the type that it is computed in.
template <Dtype dtype>
using stored_type = std::tuple_element_t<static_cast<size_t>(dtype),
                                         std::tuple<float, __nv_bfloat16, __half, double>>;
template <Dtype dtype>
using acc_type = std::conditional_t<dtype == Dtype::kDouble, double, float>;
template <Dtype dtype>
constexpr int kElements = kVector / sizeof(stored_type<dtype>);
template <Dtype dtype>
using Values = std::array<acc_type<dtype>, kElements<dtype>>;

template <Dtype dtype>
__device__ void decode(const Vector& vector, Values<dtype>& values) {
  if constexpr (dtype == Dtype::kBFloat16) {  // one instruction each; a conversion takes two
    for (int k = 0; k < kElements<dtype>; ++k)
      values[k] = std::bit_cast<float>(k % 2 ? vector[k / 2] & 0xffff0000 : vector[k / 2] << 16);
  } else {
    const auto stored = std::bit_cast<std::array<stored_type<dtype>, kElements<dtype>>>(vector);
    for (int k = 0; k < kElements<dtype>; ++k) values[k] = static_cast<acc_type<dtype>>(stored[k]);
  }
}

// Rounds to nearest even.
template <Dtype dtype>
__device__ Vector encode(const Values<dtype>& values) {
  std::array<stored_type<dtype>, kElements<dtype>> stored;
  for (int k = 0; k < kElements<dtype>; ++k) stored[k] = static_cast<stored_type<dtype>>(values[k]);
  return std::bit_cast<Vector>(stored);
}

// Calls visit.template operator()<option>() for the option that equals `which`.
template <auto... options, class Which, class Visit>
__host__ __device__ void pick(Which which, Visit&& visit) {
  ((which == options && (visit.template operator()<options>(), true)) || ...);
}

// This thread's vectors of an aligned tile that consists of whole vectors. All are loaded before
// the first is used; vectors beyond the end of the tile are zeros.
struct AtOnce {
  static constexpr int kUnroll = kVectors;
  Tile tile;
  Vector vectors[kVectors];

  __device__ explicit AtOnce(const Tile& tile) : tile(tile) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      vectors[j] = std::bit_cast<Vector>(tile.left(j) > 0 ? __ldcg(tile.at(j)) : uint4{});
  }
  __device__ Vector load(int j) const { return vectors[j]; }
  __device__ void store(int j, const Vector& vector) const {
    if (tile.left(j) > 0) *tile.at(j) = std::bit_cast<uint4>(vector);
  }
};

// This thread's vectors of any tile, loaded one at a time: for a tile that AtOnce cannot take, or
// that is read a second time.
struct OneByOne {
  static constexpr int kUnroll = 1;
  Tile tile;

  __device__ Vector load(int j) const { return copy_vector<false>(tile, j, {}); }
  __device__ void store(int j, const Vector& vector) const { copy_vector<true>(tile, j, vector); }
};

// Calls visit.template operator()<dtype>(vectors), where `vectors` is an AtOnce or a OneByOne. Both
// give a thread the same elements in the same order, whatever the alignment (Note [partition]).
__device__ void with_vectors(const Tile& tile, auto&& visit) {
  const auto visit_as_dtype = [&](const auto& vectors) {
    pick<Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf, Dtype::kDouble>(
        tile.dtype, [&]<Dtype dtype>() { visit.template operator()<dtype>(vectors); });
  };
  if (tile.aligned() && tile.bytes % kVector == 0)
    visit_as_dtype(AtOnce(tile));
  else
    visit_as_dtype(OneByOne{tile});
}

}  // namespace fastclip::cuda
