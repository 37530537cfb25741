/* Matrix products of bfloat16 operands with a float32 result, for CPUs with AVX512-BF16 (vdpbf16ps).
 *
 * Vendor libraries round such a product to bfloat16, or compute it at float32 speed; log-probabilities of a language
 * model need its float32 sums. Plain C, no dependencies beyond an OpenMP runtime. Functions may be called from several
 * threads at once; nothing is kept between calls.
 */
#ifndef FASTALIGN_GEMM_H
#define FASTALIGN_GEMM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FASTALIGN_GEMM_OK = 0,
  FASTALIGN_GEMM_BAD_ARGUMENT = 1, /* a negative size, a null pointer, two strides that are not 1, rows of c that overlap */
  FASTALIGN_GEMM_UNSUPPORTED = 2,  /* this CPU, or this build, has no AVX512-BF16 */
  FASTALIGN_GEMM_NO_MEMORY = 3     /* no room for the packed blocks: at most 8.1 MiB */
};

/* 1 if fastalign_gemm_bf16 runs on this CPU, else 0. */
int fastalign_gemm_bf16_supported(void);

/* c = a b, or c += a b where `accumulate` is not 0; float32 sums of exact bfloat16 products.
 *
 *   a  (m, k)  bfloat16: element (i, p) is a[i * a_row + p * a_col]; a_row or a_col is 1
 *   b  (k, n)  bfloat16: element (p, j) is b[p * b_row + j * b_col]; b_row or b_col is 1
 *   c  (m, n)  float32:  element (i, j) is c[i * c_row + j]; c_row >= n; overlaps neither a nor b
 *
 * Strides count elements and are not negative. With k = 0 the product is zero; with m = 0 or n = 0 nothing happens, and
 * an operand without elements may be null. `threads` is the most threads to use, 0 for the runtime's own choice.
 *
 * Rounding: products are exact, sums in float32 to nearest even, over k in order in stretches of at most 1024 that are
 * summed from zero and then added: |error| <= (min(k, 1024) + k / 1024 + 2) 2^-24 sum_p |a_ip b_pj|, typically about its
 * square root. Subnormal numbers count as zero, as vdpbf16ps has it: an operand below 2^-126 in magnitude is read as zero
 * and a sum below 2^-126 becomes zero, which adds at most k 2^-126 (1 + max |a| + max |b|). NaN and infinities propagate.
 *
 * An element of c depends on its row of a and its column of b alone: the result is the same to the bit whatever m, n,
 * the strides, the number of threads and the run. */
int fastalign_gemm_bf16(int64_t m, int64_t n, int64_t k,
                        const uint16_t *a, int64_t a_row, int64_t a_col,
                        const uint16_t *b, int64_t b_row, int64_t b_col,
                        float *c, int64_t c_row, int accumulate, int threads);

#ifdef __cplusplus
}
#endif
#endif
