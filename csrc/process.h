// Facts about the process that the kernels can only get from Python.
#pragma once

namespace fastclip {

// Whether torch.distributed is initialized: only then can there be process groups, whose
// collectives may occupy multiprocessors of a GPU until another rank joins in.
bool has_process_groups();

}  // namespace fastclip
