// The product's C interface and its blocking. Both operands are packed into panels that stay in L3; threads share out
// first the packing, then blocks of c. Blocking never changes a sum: that is cut along k alone, at fixed places.
#include "fastalign_gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "dispatch.h"
#include "gemm.h"
#include "threads.h"

namespace fastalign {
namespace {

#if defined(FASTALIGN_X86)

constexpr int64_t K_STRETCH = 1024;                   // elements of k that are summed before c is touched
constexpr int64_t ROWS = 2048, COLS = 2048;           // of c under way: the operands packed for them take at most 8 MiB
constexpr int64_t BLOCK_ROWS = 128, BLOCK_COLS = 192;  // of c for one thread: the panels of b for them stay in its L2
constexpr int64_t PRODUCTS_OF_A_THREAD = 1 << 21;     // some 20 us: fewer do not repay waking a thread

constexpr int64_t cut(int64_t x, int64_t by) noexcept { return (x + by - 1) / by; }
constexpr int64_t round_up(int64_t x, int64_t unit) noexcept { return cut(x, unit) * unit; }

// The size of equal parts, at most `most` and a multiple of `unit`: 1100 in stretches of 1024 are 2 x 550.
constexpr int64_t even_part(int64_t size, int64_t most, int64_t unit) noexcept { return round_up(cut(size, cut(size, most)), unit); }

Vectors part(const Vectors &x, int64_t vector, int64_t k) noexcept {
    return {x.data + vector * x.stride + k * x.k_stride, x.stride, x.k_stride};
}

struct Product {
    int64_t m, n, k;
    Vectors a, b;
    float *c;
    int64_t c_row_stride;
    bool accumulate;
};

struct Parts {  // of a product: c in parts of (m, n), summed over stretches of k
    int64_t m, n, k;

    explicit Parts(int64_t m, int64_t n, int64_t k) noexcept
        : m(even_part(m, ROWS, GROUP)), n(even_part(n, COLS, TILE_COLS)), k(even_part(k, K_STRETCH, 2)) {}
    int64_t packed_a() const noexcept { return m * k / 2; }  // in pairs
    int64_t packed_b() const noexcept { return n * k / 2; }
};

// Panels of TILE_ROWS rows, each [pairs][TILE_ROWS].
void pack_rows(const Vectors &a, int64_t group, int64_t m, int64_t k, Pair *packed) noexcept {
    const int64_t pairs = cut(k, 2), row = group * GROUP;
    Pair *const to = packed + row * pairs;
    pack_avx512(part(a, row, 0), std::min(GROUP, m - row), k, to, to + TILE_ROWS * pairs, TILE_ROWS);
}

// Panels of TILE_COLS columns, the last perhaps narrower, each [pairs][columns rounded up to GROUP].
void pack_columns(const Vectors &b, int64_t group, int64_t n, int64_t k, Pair *packed) noexcept {
    const int64_t col = group * GROUP, panel = col / TILE_COLS * TILE_COLS;
    const int64_t width = std::min(TILE_COLS, round_up(n, GROUP) - panel);
    Pair *const to = packed + panel * cut(k, 2) + (col - panel);
    pack_avx512(part(b, col, 0), std::min(GROUP, n - col), k, to, to + GROUP / 2, width);
}

void run(const Product &x, const Parts &parts, Pair *packed_a, Pair *packed_b, int threads) noexcept {
    for (int64_t i0 = 0; i0 < x.m; i0 += parts.m) {
        const int64_t m = std::min(parts.m, x.m - i0), a_groups = cut(m, GROUP), block_rows = cut(m, BLOCK_ROWS);
        for (int64_t k0 = 0; k0 < x.k; k0 += parts.k) {
            const int64_t k = std::min(parts.k, x.k - k0), pairs = cut(k, 2);
            const Vectors a = part(x.a, i0, k0);
            for (int64_t j0 = 0; j0 < x.n; j0 += parts.n) {
                const int64_t n = std::min(parts.n, x.n - j0), b_groups = cut(n, GROUP), block_cols = cut(n, BLOCK_COLS);
                const Vectors b = part(x.b, j0, k0);
                const int64_t first = j0 > 0 ? a_groups : 0;  // a is packed already
                const auto pack = [&](int64_t i) {
                    const int64_t group = first + i;
                    group < a_groups ? pack_rows(a, group, m, k, packed_a) : pack_columns(b, group - a_groups, n, k, packed_b);
                };
                const auto multiply = [&](int64_t block) {
                    const int64_t top = block % block_rows * BLOCK_ROWS, left = block / block_rows * BLOCK_COLS;
                    for (int64_t i = top; i < std::min(m, top + BLOCK_ROWS); i += TILE_ROWS)
                        for (int64_t j = left; j < std::min(n, left + BLOCK_COLS); j += TILE_COLS)
                            tile_avx512(
                                pairs, packed_a + i * pairs, packed_b + j * pairs, x.c + (i0 + i) * x.c_row_stride + j0 + j, x.c_row_stride,
                                std::min(TILE_ROWS, m - i), std::min(TILE_COLS, n - j), x.accumulate || k0 > 0);
                };
                parallel_for(a_groups + b_groups - first, threads, pack);
                parallel_for(block_rows * block_cols, threads, multiply);
            }
        }
    }
}

#endif

bool readable(const fastalign_bf16_matrix *x, bool empty) noexcept {
    return x && x->row_stride >= 0 && x->column_stride >= 0 && (empty || (x->data && (x->row_stride == 1 || x->column_stride == 1)));
}

}  // namespace
}  // namespace fastalign

using namespace fastalign;

extern "C" {

int fastalign_gemm_bf16_supported(void) {
#if defined(FASTALIGN_X86)
    return isa() == Isa::avx512 && has_avx512_bf16();
#else
    return 0;
#endif
}

int fastalign_gemm_bf16(
    int64_t m, int64_t n, int64_t k, const fastalign_bf16_matrix *a, const fastalign_bf16_matrix *b, float *c, int64_t c_row_stride,
    int accumulate, int threads) {
    if (m < 0 || n < 0 || k < 0 || !readable(a, m == 0 || k == 0) || !readable(b, n == 0 || k == 0)) return FASTALIGN_BAD_ARGUMENT;
    if (m > 0 && n > 0 && (!c || (m > 1 && c_row_stride < n))) return FASTALIGN_BAD_ARGUMENT;
    if (!fastalign_gemm_bf16_supported()) return FASTALIGN_UNSUPPORTED;
    if (m == 0 || n == 0) return FASTALIGN_OK;
    if (k == 0) {
        for (int64_t i = 0; i < m && !accumulate; ++i) std::fill_n(c + i * c_row_stride, n, 0.0f);
        return FASTALIGN_OK;
    }
#if defined(FASTALIGN_X86)
    const Parts parts(m, n, k);
    const int64_t bytes = round_up((parts.packed_a() + parts.packed_b()) * sizeof(Pair), 64);
    const std::unique_ptr<Pair, void (*)(void *)> packed(static_cast<Pair *>(std::aligned_alloc(64, bytes)), std::free);
    if (!packed) return FASTALIGN_NO_MEMORY;
    const int64_t useful = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(m) * n * k / PRODUCTS_OF_A_THREAD));
    run({m, n, k, {a->data, a->row_stride, a->column_stride}, {b->data, b->column_stride, b->row_stride}, c, c_row_stride, accumulate != 0},
        parts, packed.get(), packed.get() + parts.packed_a(), static_cast<int>(std::min<int64_t>(threads, useful)));
#endif
    return FASTALIGN_OK;
}

}  // extern "C"
