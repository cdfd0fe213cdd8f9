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
// So many partial results every block can add up again in a microsecond.
constexpr int64_t kMaxSpans = 2048;
// No more tiles than the smallest table has entries, so that any table holds a whole span. Beyond
// 15 GiB there are more spans instead.
constexpr int64_t kMaxSpanTiles = 240;

// A tensor, or the run of its tiles that one launch handles. 16 bytes: about 2 000 fit a launch.
struct Entry {
  char* data;
  uint64_t first_tile : 24;
  uint64_t tail : 14;  // the last tile's bytes, halved, less one
  uint64_t dtype : 2;
  uint64_t slot : 24;
};
static_assert(sizeof(Entry) == 16);
constexpr int64_t kMaxSlots = 1 << 24;
constexpr int64_t kMaxTableTiles = (1 << 24) - 1;

// What a launch reads from its parameters: whole spans of the partition.
template <size_t kBytes>
struct Table {
  static constexpr int kEntries = (kBytes - 16) / sizeof(Entry) - 1;
  static_assert(kEntries >= kMaxSpanTiles);

  int32_t count, span_tiles, spans;
  int32_t first_span;           // of the whole partition
  Entry entries[kEntries + 1];  // one more begins where the last ends

  constexpr int tiles() const { return entries[count].first_tile; }
};

// A tensor and its group, of norms or of coefficients. Without data it is a hole.
struct Part : Flat {
  int64_t slot;
  int64_t first_tile = 0;  // set by the partition

  int64_t bytes() const { return numel * element_size(); }
  int64_t tiles() const { return (bytes() + kTileBytes - 1) / kTileBytes; }
};

class Partition {
 public:
  // With `apart` a span ends where the slot changes. Empty parts take no part.
  Partition(const std::vector<Part>& parts, bool apart) {
    int64_t count = 0;
    for (const Part& part : parts) count += part.tiles();
    span_tiles_ = std::clamp<int64_t>((count + kMaxSpans - 1) / kMaxSpans, 1, kMaxSpanTiles);
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

  // Where the spans of each slot begin, and those of the last end, if parts came by ascending slot
  // and apart.
  std::vector<uint32_t> begins(int64_t slots) const {
    std::vector<uint32_t> begins;
    for (const Part& part : parts_)
      if (part.data && part.slot >= static_cast<int64_t>(begins.size()))
        begins.resize(part.slot + 1, static_cast<uint32_t>(part.first_tile / span_tiles_));
    begins.resize(slots + 1, static_cast<uint32_t>(spans()));
    return begins;
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
      const int64_t tail = cut ? kTileBytes : (part->bytes() - 1) % kTileBytes + 1;
      table.entries[table.count++] = {
          part->data + (first - part->first_tile) * kTileBytes,
          static_cast<uint64_t>(first - begin), static_cast<uint64_t>(tail / 2 - 1),
          static_cast<uint64_t>(part->dtype), static_cast<uint64_t>(part->slot)};
    }
    table.entries[table.count] = {nullptr, static_cast<uint64_t>(end - begin), 0, 0, 0};
    return end;
  }

 private:
  void add(Part part) {
    part.first_tile = tiles_;
    tiles_ += part.tiles();
    parts_.push_back(part);
  }

  std::vector<Part> parts_;
  int64_t tiles_ = 0, span_tiles_ = 1;
};

}  // namespace fastclip::cuda
