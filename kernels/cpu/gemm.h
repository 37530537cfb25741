// What the driver of the product (gemm.cpp) asks of one instruction set.
#pragma once
#include <cstdint>

namespace fastalign::gemm {

// Two neighbours along k, the even one in the low half: the operand of vdpbf16ps.
using Pair = std::uint32_t;

constexpr std::int64_t TILE_ROWS = 8, TILE_COLS = 48, GROUP = 16;  // register tile; packing works on GROUP rows or columns

// An operand as `outer` vectors along k: rows of A, or columns of B.
struct Operand {
  const std::uint16_t *data;
  std::int64_t outer_stride, k_stride;  // elements; one of the two is 1
};

// Packs vectors first .. first + count (count <= GROUP) over k elements into pairs[(k + 1) / 2][GROUP], missing ones zero:
// vectors 0-7 of pair p go to low[p * stride], 8-15 to high[p * stride].
void pack_avx512(const Operand &x, std::int64_t first, std::int64_t count, std::int64_t k0, std::int64_t k,
                 Pair *low, Pair *high, std::int64_t stride);

// c (rows, cols) = or += a b: `a` holds [pairs][TILE_ROWS], `b` [pairs][cols rounded up to GROUP], rows <= TILE_ROWS,
// cols <= TILE_COLS.
void tile_avx512(std::int64_t pairs, const Pair *a, const Pair *b, float *c, std::int64_t c_row,
                 std::int64_t rows, std::int64_t cols, bool accumulate);

}  // namespace fastalign::gemm
