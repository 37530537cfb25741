// What the blocking of the product (gemm.cpp) asks of the instruction set.
#pragma once

#include <cstdint>

namespace fastalign {

// Neighbours 2 p and 2 p + 1 along k, the even one in the low half: the operands of vdpbf16ps.
using Pair = uint32_t;

constexpr int64_t GROUP = 16;                    // vectors along k that are packed together
constexpr int64_t TILE_ROWS = 8, TILE_COLS = 48;  // of c, held in registers

// An operand as vectors along k: the rows of a, or the columns of b.
struct Vectors {
    const uint16_t *data;
    int64_t stride, k_stride;  // from one vector to the next, and along it; one of the two is 1
};

// Packs `count` <= GROUP vectors of `k` elements, starting at x.data, as pairs; absent vectors, and the odd half of the last
// pair of an odd k, are zero. Pair p of vectors 0-7 goes to low[p * step ...], of vectors 8-15 to high[p * step ...].
void pack_avx512(const Vectors &x, int64_t count, int64_t k, Pair *low, Pair *high, int64_t step) noexcept;

// c (rows <= TILE_ROWS, cols <= TILE_COLS) = or += a b, of a[pairs][TILE_ROWS] and b[pairs][cols rounded up to 16].
void tile_avx512(
    int64_t pairs, const Pair *a, const Pair *b, float *c, int64_t c_row_stride, int64_t rows, int64_t cols, bool accumulate) noexcept;

}  // namespace fastalign
