// How a tensor list is divided among the threads.
//
// Note [partition]: a tile is 16 Ki consecutive elements of one tensor, counted from its first; the
// last tile may be shorter. A span is a run of consecutive tiles, with one float64 for its result.
// The partition depends only on the sizes, the groups and the order of the list, and results are
// added in order, so a norm has the same bits with any number of threads and any alignment.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <vector>

#include "../tensor_list.h"
#include "threads.h"

namespace fastclip::cpu {

constexpr int64_t kTile = 16384;
// Few enough that results and partition take 48 KiB at most, apart from one span for each group.
constexpr int64_t kMaxSpans = 2048;
// No thread is woken for fewer elements than this.
constexpr int64_t kGrain = 65536;
// The process that loaded the extension; in a forked child getpid() differs.
inline const pid_t kLoadedBy = getpid();
// How many bytes of a later tensor to prefetch (Note [prefetch]); the hardware does the rest.
constexpr size_t kPrefetch = 512;

class Spans {
 public:
  // All tensors form one group.
  explicit Spans(const FlatList& tensors) : Spans(tensors, [](size_t) { return false; }) {}

  // No span crosses from one group to the next; without `group` each tensor is a group.
  static Spans by_group(const FlatList& tensors, at::OptionalIntArrayRef group) {
    return Spans(tensors, [=](size_t i) { return !group || (*group)[i] != (*group)[i - 1]; });
  }

  int64_t size() const { return static_cast<int64_t>(begins_.size()) - 1; }

  // The tensor in which span k begins; all tensors of a span are of one group.
  size_t first_tensor(int64_t k) const { return begins_[k].tensor; }

  // Calls visit(tensor index, address of the first element, elements) for each tile of span k.
  template <class Visit>
  void for_each_tile(int64_t k, Visit&& visit) const {
    const Begin from = begins_[k], to = begins_[k + 1];
    for (size_t i = from.tensor; i <= to.tensor && i < tensors_.size(); ++i) {
      const Flat& t = tensors_[i];
      if (i + kAhead < tensors_.size()) {
        const Flat& next = tensors_[i + kAhead];
        prefetch(next.data, std::min<size_t>(kPrefetch, next.numel * next.element_size()));
      }
      const int64_t first = i == from.tensor ? from.element : 0;
      const int64_t last = i == to.tensor ? to.element : t.numel;
      for (int64_t e = first; e < last; e += kTile)
        visit(i, t.data + e * t.element_size(), std::min(kTile, last - e));
    }
  }

  // Calls work(first span, end) on as many threads as the amount of data is worth. A forked child
  // uses one thread: it has none of its parent's threads, and OpenMP would wait for them.
  template <class Work>
  void parallel(const Work& work) const {
    const int64_t grain = 1 + size() * kGrain / std::max<int64_t>(1, tensors_.elements());
    if (size() > grain && getpid() != kLoadedBy) return work(0, size());
    cpu::parallel(size(), grain, work);
  }

 private:
  struct Begin {
    size_t tensor;
    int64_t element;
  };

  // border(i) says whether a new group begins with tensor i > 0.
  template <class Border>
  Spans(const FlatList& tensors, Border&& border) : tensors_(tensors) {
    int64_t tiles = 0;
    for (size_t i = 0; i < tensors.size(); ++i) tiles += tiles_of(tensors[i]);
    const int64_t length = std::max<int64_t>(1, (tiles + kMaxSpans - 1) / kMaxSpans);
    begins_.reserve(std::min(tiles, kMaxSpans + static_cast<int64_t>(tensors.size())) + 1);
    int64_t room = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i > 0 && border(i)) room = 0;
      const int64_t count = tiles_of(tensors[i]);
      for (int64_t tile = 0; tile < count;) {
        if (room == 0) {
          begins_.push_back({i, tile * kTile});
          room = length;
        }
        const int64_t step = std::min(room, count - tile);
        tile += step;
        room -= step;
      }
    }
    begins_.push_back({tensors.size(), 0});
  }

  static int64_t tiles_of(const Flat& t) { return (t.numel + kTile - 1) / kTile; }

  const FlatList& tensors_;
  std::vector<Begin> begins_;
};

}  // namespace fastclip::cpu
