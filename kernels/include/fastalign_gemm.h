/* Matrix products of bfloat16 operands with a float32 result, for CPUs with AVX512-BF16.
 *
 * Vendor libraries round such a product to bfloat16, or compute it at the speed of float32. Log-probabilities of a
 * language model need its float32 sums.
 */
#ifndef FASTALIGN_GEMM_H
#define FASTALIGN_GEMM_H

#include "fastalign_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 1 if fastalign_gemm_bf16 runs with the instruction set in use, else 0. */
FASTALIGN_API int fastalign_gemm_bf16_supported(void);

/* A matrix of bfloat16: element (i, j) at i * row_stride + j * column_stride, in elements. One of the two strides is 1,
 * and neither is negative. */
typedef struct fastalign_bf16_matrix {
    const uint16_t *data; /* may be null where the matrix has no elements */
    int64_t row_stride, column_stride;
} fastalign_bf16_matrix;

/* c = a b, or c += a b where `accumulate` is not 0: a is (m, k), b (k, n), and c (m, n) float32 with element (i, j) at
 * i * c_row_stride + j, c_row_stride >= n. c overlaps neither operand. With k = 0 the product is zero. At most `threads`
 * threads work, fewer on a small product. Holds at most 8.1 MiB for the time of the call.
 *
 * Sums are in float32 and run over k in order, in equal stretches of at most 1024 that start from zero and are then added:
 *
 *     |error| <= (min(k, 1024) + k / 1024 + 2) 2^-24 sum_p |a_ip b_pj|, typically about its square root.
 *
 * The instruction (vdpbf16ps) takes an operand below 2^-126 in magnitude for zero, and makes zero of a product or sum below
 * 2^-126; that adds at most k 2^-125 (1 + max |a| + max |b|). NaN and infinities propagate.
 *
 * An element of c depends on its row of a and its column of b alone: it is the same to the bit whatever m, n, the strides,
 * the number of threads and the run.
 *
 * FASTALIGN_UNSUPPORTED where fastalign_gemm_bf16_supported() is 0; FASTALIGN_NO_MEMORY. */
FASTALIGN_API int fastalign_gemm_bf16(
    int64_t m, int64_t n, int64_t k, const fastalign_bf16_matrix *a, const fastalign_bf16_matrix *b, float *c,
    int64_t c_row_stride, int accumulate, int threads);

#ifdef __cplusplus
}
#endif

#endif
