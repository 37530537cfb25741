// The product in AVX512-BF16: packing into pairs along k, and the register tile. Compiled with -mavx512bf16 and reached
// only where the CPU has it.
#include <immintrin.h>

#include "gemm.h"

namespace fastalign::gemm {
namespace {

constexpr std::int64_t AHEAD = 16;  // of k: too far apart for the hardware to foresee

// Transposes 16 x 16 words: word j of r[i] goes to word i of r[j].
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Register 4 g + q now holds columns q, 4 + q, 8 + q, 12 + q of rows 4 g .. 4 g + 3, one in each 128-bit lane.
  for (int q = 0; q < 4; ++q) {
    const __m512i even = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88), odd = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88), odd2 = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xdd);
    t[q] = _mm512_shuffle_i32x4(even, even2, 0x88);
    t[4 + q] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[8 + q] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[12 + q] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline void store(__m512i pair, Pair *low, Pair *high, std::int64_t at) {
  _mm256_store_si256(reinterpret_cast<__m256i *>(low + at), _mm512_castsi512_si256(pair));
  _mm256_store_si256(reinterpret_cast<__m256i *>(high + at), _mm512_extracti64x4_epi64(pair, 1));
}

inline __m512i widen(const std::uint16_t *x, __mmask16 some) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x));
}

template <int VECTORS>
void tile(std::int64_t pairs, const Pair *a, const Pair *b, float *c, std::int64_t c_row, std::int64_t rows, __mmask16 last,
          bool accumulate) {
  __m512 sum[TILE_ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_setzero_ps();
  for (std::int64_t p = 0; p < pairs; ++p, a += TILE_ROWS, b += 16 * VECTORS) {
    __m512bh right[VECTORS];
#pragma GCC unroll 3
    for (int j = 0; j < VECTORS; ++j) right[j] = (__m512bh)_mm512_load_si512(b + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int j = 0; j < VECTORS; ++j) {
      float *at = c + i * c_row + 16 * j;
      const __mmask16 some = j + 1 == VECTORS ? last : 0xffff;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(some, at) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(at, some, accumulate ? _mm512_add_ps(before, sum[i][j]) : sum[i][j]);
    }
  }
}

}  // namespace

void pack_avx512(const Operand &x, std::int64_t first, std::int64_t count, std::int64_t k0, std::int64_t k, Pair *low, Pair *high,
                 std::int64_t stride) {
  const std::uint16_t *start = x.data + first * x.outer_stride + k0 * x.k_stride;
  if (x.k_stride == 1) {
    for (std::int64_t p = 0; p < k; p += 32) {
      const std::int64_t left = k - p < 32 ? k - p : 32;
      const __mmask32 some = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = i < count ? _mm512_maskz_loadu_epi16(some, start + i * x.outer_stride + p) : _mm512_setzero_si512();
      transpose(r);
      const int live = static_cast<int>((left + 1) / 2);
      for (int i = 0; i < live; ++i) store(r[i], low, high, (p / 2 + i) * stride);
    }
    return;
  }
  const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
  for (std::int64_t p = 0; p < k; p += 2) {
    if (p + AHEAD + 1 < k) {
      _mm_prefetch(reinterpret_cast<const char *>(start + (p + AHEAD) * x.k_stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char *>(start + (p + AHEAD + 1) * x.k_stride), _MM_HINT_T0);
    }
    const __m512i even = widen(start + p * x.k_stride, some);
    const __m512i odd = p + 1 < k ? widen(start + (p + 1) * x.k_stride, some) : _mm512_setzero_si512();
    store(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)), low, high, p / 2 * stride);
  }
}

void tile_avx512(std::int64_t pairs, const Pair *a, const Pair *b, float *c, std::int64_t c_row, std::int64_t rows, std::int64_t cols,
                 bool accumulate) {
  const std::int64_t vectors = (cols + 15) / 16, rest = cols - 16 * (vectors - 1);
  const __mmask16 last = static_cast<__mmask16>((1u << rest) - 1);
  if (vectors == 3) tile<3>(pairs, a, b, c, c_row, rows, last, accumulate);
  if (vectors == 2) tile<2>(pairs, a, b, c, c_row, rows, last, accumulate);
  if (vectors == 1) tile<1>(pairs, a, b, c, c_row, rows, last, accumulate);
}

}  // namespace fastalign::gemm
