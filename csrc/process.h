// What only Python knows of the process that a kernel runs in.
#pragma once

namespace fastclip {

// Whether torch.distributed has its default process group, as it has where it has others. Their
// collectives may hold multiprocessors of a GPU until another rank comes along.
bool has_process_groups();

}  // namespace fastclip
