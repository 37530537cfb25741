#include "vector_avx512.h"
// Order matters: the kernels are written in terms of the vectors above.
#include "rows_kernels.h"

namespace fastalign {

const RowKernels rows_avx512 = {update, gradient, each_exp, each_tanh};

}  // namespace fastalign
