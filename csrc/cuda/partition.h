// How a tensor list is cut for a GPU, and the table in which a launch finds its part of it. Host
// code and plain structs; free of torch.
//
// Note [partition]: a tile is 32 KiB from the start of a tensor, a span is a run of consecutive
// tiles with one float64 slot for its result. The cut depends on sizes, groups and list order
// alone: neither the grid nor the number of launches nor the alignment changes a bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../formulas.h"

namespace fastclip::cuda {

constexpr int kThreads = 512;
constexpr int kTileBytes = 32768;
// So many partial results every block can add up again in two microseconds. They are ten for each
// block of an H100: the last ones to be taken leave few blocks idle.
constexpr int64_t kMaxSpans = 4096;
// No more tiles than the smallest table has entries, so that any table holds a whole span. Beyond
// 30 GiB there are more spans instead.
constexpr int64_t kMaxSpanTiles = 240;
constexpr int64_t kMaxSlots = 1 << 24;
constexpr int64_t kMaxTableTiles = (1 << 24) - 1;

// A tensor, or the run of its tiles that one launch handles. 16 bytes: about 2 000 fit a launch.
// The host packs the second half by hand: with bit-fields that took it several times as long.
struct Entry {
  char* data;
  uint64_t packed;

  static Entry of(char* data, int64_t first_tile, int64_t slot, int64_t last_bytes, Dtype dtype) {
    return {data, static_cast<uint64_t>(first_tile | slot << 24 | (last_bytes / 2 - 1) << 48) |
                      static_cast<uint64_t>(dtype) << 62};
  }
  constexpr int first_tile() const { return static_cast<int>(packed & 0xffffff); }
  constexpr int slot() const { return static_cast<int>(packed >> 24 & 0xffffff); }
  // Of its last tile. Even: the narrowest dtypes have two.
  constexpr int last_bytes() const { return 2 * (static_cast<int>(packed >> 48 & 0x3fff) + 1); }
  constexpr Dtype dtype() const { return static_cast<Dtype>(packed >> 62); }
};
static_assert(sizeof(Entry) == 16);

// What a launch reads from its parameters: whole spans of the partition.
template <size_t kBytes>
struct Table {
  static constexpr int kEntries = (kBytes - 16) / sizeof(Entry) - 1;
  static_assert(kEntries >= kMaxSpanTiles);

  int32_t count, span_tiles, spans;
  int32_t first_span;           // of the whole partition
  Entry entries[kEntries + 1];  // one more begins where the last ends

  constexpr int tiles() const { return entries[count].first_tile(); }
};

// A tensor and its slot, for a norm or a coefficient. Without data, a hole that ends a span.
struct Part : Flat {
  int64_t slot;
  int64_t first_tile = 0;  // set by the partition

  int64_t bytes() const { return numel * element_size(); }
  int64_t tiles() const { return (bytes() + kTileBytes - 1) / kTileBytes; }
};

class Partition {
 public:
  // With `apart` parts come by ascending slot, and a span ends where the slot changes. Where slots
  // are many, spans are long enough for each to be one. Empty parts take no part.
  Partition(const std::vector<Part>& parts, bool apart) {
    int64_t count = 0, longest = 0;
    for (const Part& part : parts) {
      count += part.tiles();
      longest = std::max(longest, part.tiles());
    }
    const bool many = apart && !parts.empty() && parts.back().slot >= kMaxSpans;
    const int64_t wanted = many ? longest : (count + kMaxSpans - 1) / kMaxSpans;
    span_tiles_ = std::clamp<int64_t>(wanted, 1, kMaxSpanTiles);
    parts_.reserve(parts.size());
    for (const Part& part : parts) {
      const int64_t room = spans() * span_tiles_ - tiles_;
      if (apart && room > 0 && part.slot != parts_.back().slot)
        add({{nullptr, room * kTileBytes / 4, Dtype::kFloat}, part.slot});
      if (part.numel > 0) add(part);
    }
  }

  size_t parts() const { return parts_.size(); }
  int64_t tiles() const { return tiles_; }
  int64_t spans() const { return (tiles_ + span_tiles_ - 1) / span_tiles_; }
  int64_t bytes() const { return bytes_; }

  // Where the spans of each slot begin, and those of the last end, if they are apart.
  std::vector<uint32_t> begins(int64_t slots) const {
    std::vector<uint32_t> begins;
    for (const Part& part : parts_)
      if (part.data && part.slot >= static_cast<int64_t>(begins.size()))
        begins.resize(part.slot + 1, static_cast<uint32_t>(part.first_tile / span_tiles_));
    begins.resize(slots + 1, static_cast<uint32_t>(spans()));
    return begins;
  }

  // Whether slot i is span i and no other, if they are apart.
  bool spans_are_slots(int64_t slots) const {
    return spans() == slots && std::ranges::all_of(parts_, [&](const Part& part) {
             return !part.data || part.first_tile / span_tiles_ == part.slot;
           });
  }

  // Fills a table from tile `begin`, the first of a span; returns the first tile it does not hold.
  template <size_t kBytes>
  int64_t fill(Table<kBytes>& table, int64_t begin) const {
    auto part = std::ranges::upper_bound(parts_, begin, {}, &Part::first_tile);
    if (part != parts_.begin()) --part;
    const auto beyond = part + std::min<int64_t>(table.kEntries, parts_.end() - part);
    int64_t end = beyond == parts_.end() ? tiles_ : beyond->first_tile;
    end = std::min(end, begin + kMaxTableTiles);
    if (end < tiles_) end -= end % span_tiles_;
    table.count = 0;
    table.span_tiles = static_cast<int32_t>(span_tiles_);
    table.spans = static_cast<int32_t>((end - begin + span_tiles_ - 1) / span_tiles_);
    table.first_span = static_cast<int32_t>(begin / span_tiles_);
    for (; part != parts_.end() && part->first_tile < end; ++part) {
      const int64_t first = std::max(begin, part->first_tile);
      const bool cut = part->first_tile + part->tiles() > end;
      const int64_t last_bytes = cut ? kTileBytes : (part->bytes() - 1) % kTileBytes + 1;
      table.entries[table.count++] = Entry::of(part->data + (first - part->first_tile) * kTileBytes,
                                               first - begin, part->slot, last_bytes, part->dtype);
    }
    table.entries[table.count] = Entry::of(nullptr, end - begin, 0, kTileBytes, Dtype::kFloat);
    return end;
  }

 private:
  void add(Part part) {
    part.first_tile = tiles_;
    tiles_ += part.tiles();
    if (part.data) bytes_ += part.bytes();
    parts_.push_back(part);
  }

  std::vector<Part> parts_;
  int64_t tiles_ = 0, bytes_ = 0, span_tiles_ = 1;
};

}  // namespace fastclip::cuda
