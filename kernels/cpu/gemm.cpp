// The product's blocking: both operands are packed into panels that stay in L3, and threads share out blocks of c.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include <omp.h>

#include "fastalign_gemm.h"
#include "gemm.h"

namespace fastalign::gemm {
namespace {

constexpr std::int64_t K_STRETCH = 1024;                   // elements of k summed before c is touched
constexpr std::int64_t ROWS = 2048, COLS = 2048;           // of c under way: two packed operands of at most 4 MiB, in L3
constexpr std::int64_t BLOCK_ROWS = 128, BLOCK_COLS = 192;  // of c for one thread at a time: its part of b stays in L2

std::int64_t ceil_div(std::int64_t x, std::int64_t y) { return (x + y - 1) / y; }

// Sizes as even as possible: 1100 in stretches of at most 1024 is 2 x 550, a multiple of `unit` each.
std::int64_t even_share(std::int64_t size, std::int64_t most, std::int64_t unit) {
  return ceil_div(ceil_div(size, ceil_div(size, most)), unit) * unit;
}

struct Call {
  std::int64_t m, n, k;
  Operand a, b;
  float *c;
  std::int64_t c_row;
  bool accumulate;
};

void run(const Call &call, Pair *packed_a, Pair *packed_b, int threads) {
  const std::int64_t k_step = even_share(call.k, K_STRETCH, 2);
  const std::int64_t m_step = even_share(call.m, ROWS, GROUP), n_step = even_share(call.n, COLS, TILE_COLS);
#pragma omp parallel num_threads(threads)
  for (std::int64_t i0 = 0; i0 < call.m; i0 += m_step)
    for (std::int64_t p0 = 0; p0 < call.k; p0 += k_step)
      for (std::int64_t j0 = 0; j0 < call.n; j0 += n_step) {
        const std::int64_t m = std::min(m_step, call.m - i0), n = std::min(n_step, call.n - j0), k = std::min(k_step, call.k - p0);
        const std::int64_t pairs = (k + 1) / 2;
        const std::int64_t a_groups = j0 == 0 ? ceil_div(m, GROUP) : 0, b_groups = ceil_div(n, GROUP);
#pragma omp for schedule(dynamic, 4)
        for (std::int64_t g = 0; g < a_groups + b_groups; ++g) {
          if (g < a_groups) {
            Pair *to = packed_a + g * GROUP * pairs;
            pack_avx512(call.a, i0 + g * GROUP, std::min(GROUP, m - g * GROUP), p0, k, to, to + TILE_ROWS * pairs, TILE_ROWS);
          } else {
            const std::int64_t j = (g - a_groups) * GROUP, panel = j / TILE_COLS * TILE_COLS;
            const std::int64_t width = std::min(TILE_COLS, ceil_div(n - panel, GROUP) * GROUP);
            Pair *to = packed_b + panel * pairs + (j - panel);
            pack_avx512(call.b, j0 + j, std::min(GROUP, n - j), p0, k, to, to + GROUP / 2, width);
          }
        }
        const std::int64_t block_rows = ceil_div(m, BLOCK_ROWS), block_cols = ceil_div(n, BLOCK_COLS);
        const bool accumulate = call.accumulate || p0 > 0;
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t block = 0; block < block_rows * block_cols; ++block) {
          const std::int64_t i_first = block % block_rows * BLOCK_ROWS, j_first = block / block_rows * BLOCK_COLS;
          for (std::int64_t i = i_first; i < std::min(m, i_first + BLOCK_ROWS); i += TILE_ROWS)
            for (std::int64_t j = j_first; j < std::min(n, j_first + BLOCK_COLS); j += TILE_COLS)
              tile_avx512(pairs, packed_a + i * pairs, packed_b + j * pairs, call.c + (i0 + i) * call.c_row + j0 + j, call.c_row,
                          std::min(TILE_ROWS, m - i), std::min(TILE_COLS, n - j), accumulate);
        }
      }
}

}  // namespace
}  // namespace fastalign::gemm

extern "C" int fastalign_gemm_bf16_supported(void) { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

extern "C" int fastalign_gemm_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t a_row, int64_t a_col, const uint16_t *b,
                                   int64_t b_row, int64_t b_col, float *c, int64_t c_row, int accumulate, int threads) {
  using namespace fastalign::gemm;
  if (m < 0 || n < 0 || k < 0) return FASTALIGN_GEMM_BAD_ARGUMENT;
  if (m == 0 || n == 0) return FASTALIGN_GEMM_OK;
  if (c == nullptr || c_row < n || (k > 0 && (a == nullptr || b == nullptr))) return FASTALIGN_GEMM_BAD_ARGUMENT;
  if ((a_row != 1 && a_col != 1) || (b_row != 1 && b_col != 1)) return FASTALIGN_GEMM_BAD_ARGUMENT;
  if (!fastalign_gemm_bf16_supported()) return FASTALIGN_GEMM_UNSUPPORTED;
  if (k == 0) {
    if (!accumulate)
      for (std::int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_row, n, 0.0f);
    return FASTALIGN_GEMM_OK;
  }
  const std::int64_t pairs = even_share(k, K_STRETCH, 2) / 2;
  const std::int64_t a_words = even_share(m, ROWS, GROUP) * pairs, b_words = even_share(n, COLS, TILE_COLS) * pairs;
  std::unique_ptr<Pair, decltype(&std::free)> packed(static_cast<Pair *>(std::aligned_alloc(64, ceil_div((a_words + b_words) * 4, 64) * 64)), &std::free);
  if (!packed) return FASTALIGN_GEMM_NO_MEMORY;
  run({m, n, k, {a, a_row, a_col}, {b, b_col, b_row}, c, c_row, accumulate != 0}, packed.get(), packed.get() + a_words,
      threads > 0 ? threads : omp_get_max_threads());
  return FASTALIGN_GEMM_OK;
}
