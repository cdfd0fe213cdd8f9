// How a tensor list is divided for a GPU, and the table that passes a part of the list to a launch.
// Host code and plain structs, without torch headers. kThreads and kTileBytes determine how much a
// thread loads at once.
//
// Note [partition]: a tile is 32 KiB of one tensor, counted from its first element; the last tile
// may be shorter. A span is a run of consecutive tiles, with one float64 for its result. The
// partition depends only on the sizes, the groups and the order of the list, so a norm has the same
// bits with any grid, any number of launches and any alignment.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../formulas.h"

namespace fastclip::cuda {

// A thread loads kTileBytes / kThreads / 16 vectors of 16 bytes at once. This number is kVectors of
// tile.cuh; sum_tile of norm.cuh and kResident of launch.cu depend on its present value.
constexpr int kThreads = 512;
constexpr int kTileBytes = 32768;
// Few enough that every block can add up all partial results. On an H100 a block takes about ten
// spans, so that few blocks are idle while the last spans are read.
constexpr int64_t kMaxSpans = 4096;
// A span has no more tiles than the smallest table has entries, so that any table holds a whole
// span. Lists of more than 30 GiB therefore have more than kMaxSpans spans.
constexpr int64_t kMaxSpanTiles = 240;
constexpr int64_t kMaxGroups = 1 << 24;
constexpr int64_t kMaxTableTiles = (1 << 24) - 1;

// A tensor, or the run of its tiles that one launch handles. An entry has 16 bytes, so that one
// launch can take about 2 000 entries. `packed` is packed by hand: bit-fields took several times as
// long.
struct Entry {
  static constexpr uint64_t kLastWhole = uint64_t{kTileBytes / 2 - 1} << 48;
  char* data;
  uint64_t packed;

  // A hole holds no data: its tiles, up to the first of the next entry, are skipped.
  constexpr bool is_hole() const { return data == nullptr; }
  constexpr int first_tile() const { return static_cast<int>(packed & 0xffffff); }
  constexpr int group() const { return static_cast<int>(packed >> 24 & 0xffffff); }
  // The bytes of the last tile. They are even, since the narrowest dtypes have two bytes.
  constexpr int last_bytes() const { return 2 * (static_cast<int>(packed >> 48 & 0x3fff) + 1); }
  constexpr Dtype dtype() const { return static_cast<Dtype>(packed >> 62); }
};
static_assert(sizeof(Entry) == 16);
static_assert(static_cast<int>(Dtype::kCount) <= 1 << 2, "the dtype has two bits");
static_assert(kTileBytes / 2 <= 1 << 14, "half the bytes of a last tile have 14 bits");

// The part of the partition, in whole spans, that a launch gets as its kernel parameter.
template <size_t kBytes>
struct Table {
  static constexpr int kEntries = (kBytes - 16) / sizeof(Entry) - 1;
  static_assert(kEntries >= kMaxSpanTiles);

  int32_t count, span_tiles, spans;
  int32_t first_span;           // counted in the whole partition
  Entry entries[kEntries + 1];  // one more than kEntries, to mark the end

  constexpr int tiles() const { return entries[count].first_tile(); }
};

// A tensor and its group, which has a norm or a coefficient of its own.
struct Item : Flat {
  int64_t group;

  int64_t bytes() const { return numel * element_size(); }
  int64_t tiles() const { return (bytes() + kTileBytes - 1) / kTileBytes; }
};

class Partition {
 public:
  // With `apart` the items must be sorted by group, and no span crosses from one group to the next:
  // a hole fills up a group's last span. With more than kMaxSpans groups, spans are as long as
  // the largest tensor, up to kMaxSpanTiles tiles.
  Partition(const std::vector<Item>& items, bool apart) {
    int64_t count = 0;
    for (const Item& item : items) count += item.tiles();
    const bool many = apart && !items.empty() && items.back().group >= kMaxSpans;
    const int64_t wanted = many ? std::ranges::max(items, {}, &Item::tiles).tiles()
                                : (count + kMaxSpans - 1) / kMaxSpans;
    span_tiles_ = std::clamp<int64_t>(wanted, 1, kMaxSpanTiles);
    entries_.reserve(items.size());
    first_tiles_.reserve(items.size() + 1);
    for (const Item& item : items) {
      const int64_t room = spans() * span_tiles_ - tiles();
      if (apart && room > 0 && item.group != entries_.back().group()) add(nullptr, 0, room);
      if (item.numel == 0) continue;
      const int64_t bytes = item.bytes(), halves = (bytes - 1) % kTileBytes / 2;
      bytes_ += bytes;
      add(item.data,
          static_cast<uint64_t>(item.dtype) << 62 | static_cast<uint64_t>(halves << 48) |
              static_cast<uint64_t>(item.group << 24),
          item.tiles());
    }
  }

  size_t entries() const { return entries_.size(); }
  int64_t tiles() const { return first_tiles_.back(); }
  int64_t spans() const { return (tiles() + span_tiles_ - 1) / span_tiles_; }
  int64_t bytes() const { return bytes_; }

  // The first span of each group, and the end of the last group's spans. Needs `apart`.
  std::vector<uint32_t> begins(size_t groups) const {
    std::vector<uint32_t> begins;
    for (size_t i = 0; i < entries_.size(); ++i)
      if (!entries_[i].is_hole() && entries_[i].group() >= static_cast<int>(begins.size()))
        begins.resize(entries_[i].group() + 1,
                      static_cast<uint32_t>(first_tiles_[i] / span_tiles_));
    begins.resize(groups + 1, static_cast<uint32_t>(spans()));
    return begins;
  }

  // Whether group i is exactly span i, for all groups. Needs `apart`.
  bool spans_are_groups(int64_t groups) const {
    bool all = spans() == groups;
    for (size_t i = 0; all && i < entries_.size(); ++i) {
      const int64_t begin = first_tiles_[i] / span_tiles_, last = first_tiles_[i + 1] - 1;
      all = entries_[i].is_hole() || (begin == entries_[i].group() && last / span_tiles_ == begin);
    }
    return all;
  }

  // Fills a table from tile `begin`, where a span begins; returns the tile after the table's end.
  template <size_t kBytes>
  int64_t fill(Table<kBytes>& table, int64_t begin) const {
    size_t i = std::ranges::upper_bound(first_tiles_, begin) - first_tiles_.begin() - 1;
    int64_t end = first_tiles_[std::min(i + table.kEntries, entries_.size())];
    end = std::min(end, begin + kMaxTableTiles);
    if (end < tiles()) end -= end % span_tiles_;
    table.count = 0;
    table.span_tiles = static_cast<int32_t>(span_tiles_);
    table.spans = static_cast<int32_t>((end - begin + span_tiles_ - 1) / span_tiles_);
    table.first_span = static_cast<int32_t>(begin / span_tiles_);
    for (; first_tiles_[i] < end; ++i) {
      const int64_t first = std::max(begin, first_tiles_[i]);
      table.entries[table.count++] = {entries_[i].data + (first - first_tiles_[i]) * kTileBytes,
                                      entries_[i].packed + static_cast<uint64_t>(first - begin)};
    }
    if (first_tiles_[i] > end) table.entries[table.count - 1].packed |= Entry::kLastWhole;
    table.entries[table.count] = {nullptr, static_cast<uint64_t>(end - begin)};
    return end;
  }

 private:
  void add(char* data, uint64_t packed, int64_t tiles) {
    entries_.push_back({data, packed});
    first_tiles_.push_back(first_tiles_.back() + tiles);
  }

  std::vector<Entry> entries_;              // without first tiles: these depend on the table
  std::vector<int64_t> first_tiles_ = {0};  // of each entry, and the end of the last
  int64_t bytes_ = 0, span_tiles_ = 1;
};

}  // namespace fastclip::cuda
