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

constexpr int64_t STRETCH = 1024;                      // elements of k that are summed before c is touched
constexpr int64_t PACKED = 1 << 21;                    // elements of an operand that are packed at a time: 4 MiB, in L3
constexpr int64_t BLOCK_ROWS = 128, BLOCK_COLS = 192;  // of c for one thread: the panels of b for them stay in its L2
constexpr int64_t GROUPS = 4;                          // packed by one thread: 64 neighbours fill two cache lines
constexpr int64_t PRODUCTS_OF_A_THREAD = 1 << 21;      // some 20 us: fewer do not repay waking a thread

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

// What is under way at a time: (m, n) of c, summed over some stretches of k.
struct Parts {
    int64_t k;  // of a stretch, the same whatever m and n are
    int64_t m, n, stretches;

    explicit Parts(const Product &x) noexcept : k(even_part(x.k, STRETCH, 2)) {
        m = even_part(x.m, PACKED / k, GROUP);
        n = even_part(x.n, PACKED / k / TILE_COLS * TILE_COLS, TILE_COLS);
        stretches = std::min(cut(x.k, k), std::max<int64_t>(1, PACKED / (k * std::max(m, n))));
    }
    int64_t pairs_of_a() const noexcept { return m * k / 2; }  // in a stretch
    int64_t pairs_of_b() const noexcept { return n * k / 2; }
    int64_t pairs() const noexcept { return stretches * (pairs_of_a() + pairs_of_b()); }
};

// Panels of TILE_ROWS rows, each [pairs][TILE_ROWS].
struct PackedRows {
    const Vectors x;
    const int64_t count, k;
    Pair *const to;

    void pack(int64_t row, int64_t k0, int64_t here) const noexcept {
        Pair *const panel = to + row * cut(k, 2) + k0 / 2 * TILE_ROWS;
        pack_avx512(part(x, row, k0), std::min(GROUP, count - row), here, panel, panel + cut(k, 2) * TILE_ROWS, TILE_ROWS);
    }
};

// Panels of TILE_COLS columns, the last perhaps narrower, each [pairs][columns rounded up to GROUP].
struct PackedColumns {
    const Vectors x;
    const int64_t count, k;
    Pair *const to;

    void pack(int64_t col, int64_t k0, int64_t here) const noexcept {
        const int64_t first = col / TILE_COLS * TILE_COLS, width = std::min(TILE_COLS, round_up(count, GROUP) - first);
        Pair *const panel = to + first * cut(k, 2) + (col - first) + k0 / 2 * width;
        pack_avx512(part(x, col, k0), std::min(GROUP, count - col), here, panel, panel + GROUP / 2, width);
    }
};

// Packs GROUPS groups. Vectors that lie side by side take turns, so that a cache line is used whole while it is there.
template <class Packed>
void pack_groups(const Packed &packed, int64_t index) noexcept {
    const int64_t first = index * GROUPS * GROUP, last = std::min(packed.count, first + GROUPS * GROUP);
    const int64_t turn = packed.x.k_stride == 1 ? packed.k : 4 * GROUP;
    for (int64_t k0 = 0; k0 < packed.k; k0 += turn)
        for (int64_t v = first; v < last; v += GROUP) packed.pack(v, k0, std::min(turn, packed.k - k0));
}

// c (m, n) from (i0, j0) on, over all of k; `packed` has room for parts.pairs().
void multiply(const Product &x, const Parts &parts, int64_t i0, int64_t j0, Pair *packed, int threads) noexcept {
    const int64_t m = std::min(parts.m, x.m - i0), n = std::min(parts.n, x.n - j0);
    const int64_t row_groups = cut(m, GROUPS * GROUP), groups = row_groups + cut(n, GROUPS * GROUP);
    const int64_t row_blocks = cut(m, BLOCK_ROWS), blocks = row_blocks * cut(n, BLOCK_COLS);
    for (int64_t start = 0; start < x.k; start += parts.stretches * parts.k) {
        const int64_t stretches = std::min(parts.stretches, cut(x.k - start, parts.k));
        const auto length = [&](int64_t s) { return std::min(parts.k, x.k - start - s * parts.k); };
        const auto rows = [&](int64_t s) {
            return PackedRows{part(x.a, i0, start + s * parts.k), m, length(s), packed + s * parts.pairs_of_a()};
        };
        const auto columns = [&](int64_t s) {
            Pair *const to = packed + parts.stretches * parts.pairs_of_a() + s * parts.pairs_of_b();
            return PackedColumns{part(x.b, j0, start + s * parts.k), n, length(s), to};
        };
        const auto pack = [&](int64_t task) {
            const int64_t s = task / groups, index = task % groups;
            index < row_groups ? pack_groups(rows(s), index) : pack_groups(columns(s), index - row_groups);
        };
        const auto block = [&](int64_t task) {
            const int64_t top = task % row_blocks * BLOCK_ROWS, bottom = std::min(m, top + BLOCK_ROWS);
            const int64_t left = task / row_blocks * BLOCK_COLS, right = std::min(n, left + BLOCK_COLS);
            for (int64_t s = 0; s < stretches; ++s) {
                const int64_t pairs = cut(length(s), 2);
                const Pair *const a = rows(s).to, *const b = columns(s).to;
                for (int64_t i = top; i < bottom; i += TILE_ROWS)
                    for (int64_t j = left; j < right; j += TILE_COLS)
                        tile_avx512(
                            pairs, a + i * pairs, b + j * pairs, x.c + (i0 + i) * x.c_row_stride + j0 + j, x.c_row_stride,
                            std::min(TILE_ROWS, m - i), std::min(TILE_COLS, n - j), x.accumulate || start + s > 0);
            }
        };
        parallel_for(stretches * groups, threads, pack);
        parallel_for(blocks, threads, block);
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
    const Product x{
        m, n, k, {a->data, a->row_stride, a->column_stride}, {b->data, b->column_stride, b->row_stride}, c, c_row_stride, accumulate != 0};
    const Parts parts(x);
    const size_t bytes = static_cast<size_t>(round_up(parts.pairs() * int64_t{sizeof(Pair)}, 64));
    const std::unique_ptr<Pair, void (*)(void *)> packed(static_cast<Pair *>(std::aligned_alloc(64, bytes)), std::free);
    if (!packed) return FASTALIGN_NO_MEMORY;
    const double useful = std::max(1.0, static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / PRODUCTS_OF_A_THREAD);
    const int team = useful < threads ? static_cast<int>(useful) : threads;
    for (int64_t i0 = 0; i0 < m; i0 += parts.m)
        for (int64_t j0 = 0; j0 < n; j0 += parts.n) multiply(x, parts, i0, j0, packed.get(), team);
#endif
    return FASTALIGN_OK;
}

}  // extern "C"
