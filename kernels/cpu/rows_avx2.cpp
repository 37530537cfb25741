#include "vector_avx2.h"
// Order matters: the kernels are written in terms of the vectors above.
#include "rows_kernels.h"

namespace fastalign {

const RowKernels rows_avx2 = {update, gradient, each_exp, each_tanh};

}  // namespace fastalign
