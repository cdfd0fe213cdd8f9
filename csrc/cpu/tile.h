// The three loops over one tile: everything that depends on a dtype or an instruction set.
#pragma once

#include "../formulas.h"

namespace fastclip::cpu {

// The sum or maximum of n magnitudes, or the sum of n squares; NaN if any element is NaN. Finite
// elements give a finite result, unless squares of float64 overflow (see may_have_overflowed).
double measure(const void* data, Dtype dtype, int64_t n, Norm kind);

// data *= coef, in float32 with one rounding (float64 elements in float64). If the coefficient is
// -0.0 (see Note [coef]), all elements become 0, even NaN.
void scale(void* data, Dtype dtype, int64_t n, double coef);

// data = min(max(data, -bound), bound) with the bound rounded to dtype; NaN stays NaN. Writes
// nothing if no element is beyond the bound.
void clamp(void* data, Dtype dtype, int64_t n, double bound);

}  // namespace fastclip::cpu
