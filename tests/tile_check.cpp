// Runs the loops of csrc/cpu/tile.cpp on the cases in its input, which test_tile.py makes and
// judges. It needs no torch to run, so that it runs for other processors too.
#include <cstdio>
#include <vector>

#include "../csrc/cpu/tile.h"

struct Case {
  int64_t loop, dtype, bytes, start, numel;  // `start`: of the elements in the memory, in bytes
  double value;                              // an order, a coefficient or a bound
};

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
    std::vector<char> memory(c.bytes);
    if (std::fread(memory.data(), 1, memory.size(), stdin) != memory.size()) return 1;
    const auto dtype = static_cast<fastclip::Dtype>(c.dtype);
    void* const data = memory.data() + c.start;
    double norm = 0;
    if (c.loop == 0)
      norm = fastclip::cpu::measure(data, dtype, c.numel, fastclip::norm_kind(c.value));
    else if (c.loop == 1)
      fastclip::cpu::scale(data, dtype, c.numel, c.value);
    else
      fastclip::cpu::clamp(data, dtype, c.numel, c.value);
    std::fwrite(&norm, sizeof norm, 1, stdout);
    std::fwrite(memory.data(), 1, memory.size(), stdout);
  }
}
