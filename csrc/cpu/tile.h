// The three loops over one tile: everything that depends on a dtype or an instruction set.
#pragma once

#include "../formulas.h"

namespace fastclip::cpu {

// The partial result of n elements: their sum, sum of squares or maximum (NaN wins), and for any
// other p their norm, since powers of it may not fit a float64. Finite for finite elements, but
// for squares of float64 ones, see without_overflow.
double measure(const void* data, Dtype dtype, int64_t n, Norm kind, double p);

// data *= coef, in float32 with one rounding (float64 elements in float64); below 0, see Note
// [coef], data = 0.
void scale(void* data, Dtype dtype, int64_t n, double coef);

// data = min(max(data, -bound), bound) with the bound rounded to dtype; NaN stays. Writes nothing
// if no element is outside.
void clamp(void* data, Dtype dtype, int64_t n, double bound);

}  // namespace fastclip::cpu
