// The row kernels of one instruction set.
#pragma once

#include "fastalign_rows.h"

namespace fastalign {

struct RowKernels {
    void (*update)(const fastalign_tile &, const fastalign_logit_map &, const fastalign_row_state &, int64_t row);
    void (*gradient)(const fastalign_tile &, const fastalign_logit_map &, const fastalign_row_gradient &, int64_t row);
    void (*exp)(const float *x, float *y, int64_t n);
    void (*tanh)(const float *x, float *y, int64_t n);
};

extern const RowKernels rows_scalar;
extern const RowKernels rows_neon;
extern const RowKernels rows_avx2;
extern const RowKernels rows_avx512;

}  // namespace fastalign
