// The three loops over one tile: everything that depends on a dtype or an instruction set.
#pragma once

#include "../formulas.h"

namespace fastclip::cpu {

// The partial result of n elements: their sum, sum of squares or maximum (NaN wins). Finite for
// finite elements, but for squares of float64 ones, see may_have_overflowed.
double measure(const void* data, Dtype dtype, int64_t n, Norm kind);

// data *= coef, in float32 with one rounding (float64 elements in float64); data = 0 where the
// coefficient is -0.0 (see Note [coef]), and only there.
void scale(void* data, Dtype dtype, int64_t n, double coef);

// data = min(max(data, -bound), bound) with the bound rounded to dtype; NaN stays. Writes nothing
// if no element is outside.
void clamp(void* data, Dtype dtype, int64_t n, double bound);

}  // namespace fastclip::cpu
