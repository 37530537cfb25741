/* Row kernels: online statistics over tiles of logits, and the gradient of the logits in their place.
 *
 * A tile holds columns first : first + columns of the raw products hidden @ weight^T of some rows. The logits are
 *
 *     y = logit_scale (x + bias),   z = softcap tanh(y / softcap) inv_temperature   (without softcap: z = y inv_temperature)
 *
 * and every statistic is one of softmax(z) over the whole row. All arithmetic is in float32, sums over more than a
 * thousand columns in float64. Results do not depend on the number of threads, and are equal bit for bit on a rerun with
 * the same instruction set.
 *
 * Errors of the functions inside: exp at most 1.1 ulp for arguments in [-87.33, 88.37], 0 below and infinite above; tanh
 * at most 1.5 ulp.
 */
#ifndef FASTALIGN_ROWS_H
#define FASTALIGN_ROWS_H

#include "fastalign_native.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fastalign_tile {
    void *x;               /* (rows, columns) raw products; column c of row r at r * row_stride + c */
    int32_t dtype;         /* fastalign_dtype of x */
    int64_t rows, columns; /* either may be 0 */
    int64_t row_stride;    /* in elements, at least columns */
    int64_t first;         /* the tile's first column, counted from the first of the whole row */
    const int64_t *target; /* (rows), counted from the first column of the whole row; elsewhere than in the tile: no target */
} fastalign_tile;

typedef struct fastalign_logit_map {
    const float *bias;            /* (columns) of this tile, or null */
    const float *inv_temperature; /* (rows), or null for common_inv_temperature */
    float common_inv_temperature;
    float logit_scale;
    float softcap; /* 0: none */
} fastalign_logit_map;

/* Statistics of the columns seen so far, each (rows), read and written. Start with target_logit NaN, m -infinity and the
 * others 0. */
typedef struct fastalign_row_state {
    float *target_logit; /* z of the target, once its tile has been seen */
    float *m;            /* max z; NaN if a z is */
    float *s;            /* sum exp(z - m) */
    float *t;            /* sum exp(z - m) (z - m), for the entropy; or null */
    float *q;            /* sum exp(2 (z - m)); or null */
    float *z_sum;        /* sum z; or null */
} fastalign_row_state;

/* Fold a tile into the statistics of its rows. The tiles of a row may come in any order. Reads the tile once from memory.
 * At most `threads` threads work; fewer on a small tile. */
FASTALIGN_API int fastalign_rows_update(
    const fastalign_tile *tile, const fastalign_logit_map *logits, const fastalign_row_state *state, int threads);

/* dL/d output of each row, (rows) each, or null for none. */
typedef struct fastalign_row_gradient {
    const float *lse;       /* log-sum-exp of the whole row; never null */
    const float *entropy;   /* of the whole row; needed with c_entropy */
    const float *c_logps;   /* dL/d (log-probability of the target) */
    const float *c_lse;     /* dL/d lse */
    const float *c_entropy; /* dL/d entropy */
    const float *c_mean;    /* dL/d (mean of z over the vocabulary) */
    int64_t vocabulary;     /* columns of the whole row */
    int32_t dtype;          /* of the result: that of the tile, or a narrower one */
} fastalign_row_gradient;

/* Overwrite a tile by dL/dx:
 *
 *     dL/dz_v = c_logps (1[v = target] - p_v) + c_lse p_v - c_entropy p_v (log p_v + entropy) + c_mean / vocabulary
 *
 * times dz/dx. Row r of the result begins at the byte where row r of x began, so in elements of a result half as wide the
 * row stride is twice that of the tile. Log-probabilities below -10^4 count as -10^4 beside the entropy, so that
 * columns of -infinity have gradient 0. Rounds once, to nearest even. */
FASTALIGN_API int fastalign_rows_gradient(
    const fastalign_tile *tile, const fastalign_logit_map *logits, const fastalign_row_gradient *gradient, int threads);

/* y[i] = exp(x[i]) or tanh(x[i]), i < n, by the functions of the instruction set in use: for tests of their error. */
FASTALIGN_API int fastalign_rows_exp(const float *x, float *y, int64_t n);
FASTALIGN_API int fastalign_rows_tanh(const float *x, float *y, int64_t n);

#ifdef __cplusplus
}
#endif

#endif
