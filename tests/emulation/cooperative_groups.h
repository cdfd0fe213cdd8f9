// The grid barrier, see cuda_runtime.h.
#pragma once

#include "machine.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulation::wait_for_grid(); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
