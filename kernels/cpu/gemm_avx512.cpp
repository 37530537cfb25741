// The product in AVX512-BF16: packing along k, and the tile of c in registers.
#include "gemm.h"

#include <immintrin.h>

#include <algorithm>

namespace fastalign {
namespace {

// What to fetch early: rows are too many, or too far apart, for the hardware to foresee.
constexpr int64_t AHEAD_ALONG = 256, AHEAD_ACROSS = 16;  // elements of k

// Word j of r[i] goes to word i of r[j].
inline void transpose(__m512i (&r)[16]) noexcept {
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
    for (int q = 0; q < 4; ++q) {  // lane l of r[4 g + q] holds word 4 l + q of rows 4 g ... 4 g + 3
        const __m512i a = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88), b = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xdd), d = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xdd);
        t[q] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[4 + q] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[8 + q] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[12 + q] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    std::copy(t, t + 16, r);
}

inline void fetch(const uint16_t *x) noexcept { _mm_prefetch(reinterpret_cast<const char *>(x), _MM_HINT_T0); }

inline void store(__m512i pairs, Pair *low, Pair *high) noexcept {
    _mm256_store_si256(reinterpret_cast<__m256i *>(low), _mm512_castsi512_si256(pairs));
    _mm256_store_si256(reinterpret_cast<__m256i *>(high), _mm512_extracti64x4_epi64(pairs, 1));
}

// Vectors whose elements are neighbours: 32 elements of each at a time, as 16 x 16 pairs.
void pack_along(const Vectors &x, int64_t count, int64_t k, Pair *low, Pair *high, int64_t step) noexcept {
    for (int64_t p = 0; p < k; p += 32) {
        const int64_t here = std::min<int64_t>(32, k - p);
        const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << here) - 1);
        __m512i r[16];
        for (int i = 0; i < 16; ++i)
            r[i] = i < count ? _mm512_maskz_loadu_epi16(some, x.data + i * x.stride + p) : _mm512_setzero_si512();
        for (int i = 0; i < count && p + AHEAD_ALONG < k; ++i) fetch(x.data + i * x.stride + p + AHEAD_ALONG);
        transpose(r);
        for (int i = 0; i < (here + 1) / 2; ++i, low += step, high += step) store(r[i], low, high);
    }
}

// Vectors that lie side by side: elements 2 p and 2 p + 1 of all of them at a time.
void pack_across(const Vectors &x, int64_t count, int64_t k, Pair *low, Pair *high, int64_t step) noexcept {
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    const auto words = [&](int64_t p) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x.data + p * x.k_stride)); };
    for (int64_t p = 0; p < k; p += 2, low += step, high += step) {
        if (p + AHEAD_ACROSS + 1 < k) {
            fetch(x.data + (p + AHEAD_ACROSS) * x.k_stride);
            fetch(x.data + (p + AHEAD_ACROSS + 1) * x.k_stride);
        }
        const __m512i odd = p + 1 < k ? words(p + 1) : _mm512_setzero_si512();
        store(_mm512_or_si512(words(p), _mm512_slli_epi32(odd, 16)), low, high);
    }
}

// A tile of 16 VECTORS columns; `last` masks those of its last vector. 8 x 3 sums, 3 vectors of b and one pair of a fill 28
// of the 32 registers, and 24 instructions share 11 loads.
template <int VECTORS>
void tile(
    int64_t pairs, const Pair *a, const Pair *b, float *c, int64_t c_row_stride, int64_t rows, __mmask16 last, bool accumulate) noexcept {
    __m512 sum[TILE_ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p, a += TILE_ROWS, b += 16 * VECTORS) {
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
            float *const to = c + i * c_row_stride + 16 * j;
            const __mmask16 some = j + 1 == VECTORS ? last : __mmask16(0xffff);
            _mm512_mask_storeu_ps(to, some, accumulate ? _mm512_add_ps(_mm512_maskz_loadu_ps(some, to), sum[i][j]) : sum[i][j]);
        }
    }
}

}  // namespace

void pack_avx512(const Vectors &x, int64_t count, int64_t k, Pair *low, Pair *high, int64_t step) noexcept {
    x.k_stride == 1 ? pack_along(x, count, k, low, high, step) : pack_across(x, count, k, low, high, step);
}

void tile_avx512(
    int64_t pairs, const Pair *a, const Pair *b, float *c, int64_t c_row_stride, int64_t rows, int64_t cols, bool accumulate) noexcept {
    const int64_t vectors = (cols + 15) / 16;
    const __mmask16 last = static_cast<__mmask16>((1u << (cols - 16 * (vectors - 1))) - 1);
    const auto run = vectors == 3 ? tile<3> : vectors == 2 ? tile<2> : tile<1>;
    run(pairs, a, b, c, c_row_stride, rows, last, accumulate);
}

}  // namespace fastalign
