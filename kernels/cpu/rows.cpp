// The C interface of the row kernels: checks what it is given, and splits rows over threads.
#include "fastalign_rows.h"

#include <algorithm>

#include "dispatch.h"
#include "rows_table.h"
#include "threads.h"

namespace fastalign {
namespace {

constexpr int64_t ELEMENTS_OF_A_TASK = 1 << 14;    // some 10 us: far more than taking a task costs
constexpr int64_t ELEMENTS_OF_A_THREAD = 1 << 16;  // fewer do not repay waking a thread

const RowKernels &kernels() noexcept {
    switch (isa()) {
#if defined(FASTALIGN_X86)
        case Isa::avx512: return rows_avx512;
        case Isa::avx2: return rows_avx2;
#endif
#if defined(FASTALIGN_ARM64)
        case Isa::neon: return rows_neon;
#endif
        default: return rows_scalar;
    }
}

bool known(int32_t dtype) noexcept { return dtype >= FASTALIGN_FLOAT32 && dtype <= FASTALIGN_FLOAT16; }

int check(const fastalign_tile *tile, const fastalign_logit_map *logits) noexcept {
    if (!tile || !logits || tile->rows < 0 || tile->columns < 0) return FASTALIGN_BAD_ARGUMENT;
    if (!known(tile->dtype)) return FASTALIGN_UNSUPPORTED;
    if (tile->rows > 0 && (!tile->target || (tile->columns > 0 && !tile->x))) return FASTALIGN_BAD_ARGUMENT;
    return tile->rows > 1 && tile->row_stride < tile->columns ? FASTALIGN_BAD_ARGUMENT : FASTALIGN_OK;
}

template <class Row>
void each_row(const fastalign_tile &tile, int threads, const Row &row) noexcept {
    const int64_t step = std::max<int64_t>(1, ELEMENTS_OF_A_TASK / std::max<int64_t>(1, tile.columns));
    const int64_t useful = std::max<int64_t>(1, tile.rows * tile.columns / ELEMENTS_OF_A_THREAD);
    const auto task = [&](int64_t i) {
        for (int64_t r = i * step, end = std::min(tile.rows, r + step); r < end; ++r) row(r);
    };
    parallel_for((tile.rows + step - 1) / step, static_cast<int>(std::min<int64_t>(threads, useful)), task);
}

}  // namespace
}  // namespace fastalign

using namespace fastalign;

extern "C" {

int fastalign_rows_update(
    const fastalign_tile *tile, const fastalign_logit_map *logits, const fastalign_row_state *state, int threads) {
    if (const int bad = check(tile, logits)) return bad;
    if (!state || (tile->rows > 0 && (!state->target_logit || !state->m || !state->s))) return FASTALIGN_BAD_ARGUMENT;
    const auto update = kernels().update;
    each_row(*tile, threads, [&](int64_t row) { update(*tile, *logits, *state, row); });
    return FASTALIGN_OK;
}

int fastalign_rows_gradient(
    const fastalign_tile *tile, const fastalign_logit_map *logits, const fastalign_row_gradient *gradient, int threads) {
    if (const int bad = check(tile, logits)) return bad;
    if (!gradient || gradient->vocabulary < tile->columns) return FASTALIGN_BAD_ARGUMENT;
    if (!known(gradient->dtype) || (tile->dtype != FASTALIGN_FLOAT32 && gradient->dtype != tile->dtype)) return FASTALIGN_UNSUPPORTED;
    if (tile->rows > 0 && (!gradient->lse || (gradient->c_entropy && !gradient->entropy))) return FASTALIGN_BAD_ARGUMENT;
    const auto run = kernels().gradient;
    each_row(*tile, threads, [&](int64_t row) { run(*tile, *logits, *gradient, row); });
    return FASTALIGN_OK;
}

int fastalign_rows_exp(const float *x, float *y, int64_t n) {
    if (n < 0 || (n > 0 && (!x || !y))) return FASTALIGN_BAD_ARGUMENT;
    kernels().exp(x, y, n);
    return FASTALIGN_OK;
}

int fastalign_rows_tanh(const float *x, float *y, int64_t n) {
    if (n < 0 || (n > 0 && (!x || !y))) return FASTALIGN_BAD_ARGUMENT;
    kernels().tanh(x, y, n);
    return FASTALIGN_OK;
}

}  // extern "C"
