// `Floats` of 16 lanes for AVX-512 F, BW, DQ and VL; what each function does is in vector_scalar.h.
#pragma once

#include <immintrin.h>

#include "elements.h"

namespace fastalign {
namespace {

constexpr int LANES = 16;

struct Floats {
    __m512 v;
};

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }

inline Floats load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const BF16 *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Floats load(const FP16 *p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))}; }

inline void store(float *p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline void store(BF16 *p, Floats a) {  // not VCVTNEPS2BF16, which takes subnormals for 0 and needs AVX512-BF16
    const __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(result));
}
inline void store(FP16 *p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats where_less(Floats a, Floats b, Floats x, Floats y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats with_sign(Floats a, Floats s) {
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));  // 0xd8: the bits of s where sign is set, else a's
    const __m512i bits = _mm512_ternarylogic_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(s.v), sign, 0xd8);
    return {_mm512_castsi512_ps(bits)};
}
inline Floats add_exponent(Floats a, Floats n) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), shifted))};
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float highest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline float first(Floats a) { return _mm512_cvtss_f32(a.v); }

}  // namespace
}  // namespace fastalign
