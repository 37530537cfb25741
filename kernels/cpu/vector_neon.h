// `Floats` of 4 lanes for AArch64; what each function does is in vector_scalar.h.
#pragma once

#include <arm_neon.h>

#include "elements.h"

namespace fastalign {
namespace {

constexpr int LANES = 4;

struct Floats {
    float32x4_t v;
};

inline Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.v, b.v)}; }
inline Floats all(float x) { return {vdupq_n_f32(x)}; }

inline Floats load(const float *p) { return {vld1q_f32(p)}; }
inline Floats load(const BF16 *p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)), 16))};
}
inline Floats load(const FP16 *p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p))))};
}

inline void store(float *p, Floats a) { vst1q_f32(p, a.v); }
inline void store(BF16 *p, Floats a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const uint32x4_t number = vceqq_f32(a.v, a.v);
    vst1_u16(reinterpret_cast<uint16_t *>(p), vmovn_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc0))));
}
inline void store(FP16 *p, Floats a) { vst1_u16(reinterpret_cast<uint16_t *>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }

inline Floats fma(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Floats larger(Floats a, Floats b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Floats where_less(Floats a, Floats b, Floats x, Floats y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
inline Floats magnitude(Floats a) { return {vabsq_f32(a.v)}; }
inline Floats with_sign(Floats a, Floats s) { return {vbslq_f32(vdupq_n_u32(0x80000000u), s.v, a.v)}; }
inline Floats add_exponent(Floats a, Floats n) {
    return {vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a.v), vshlq_n_u32(vreinterpretq_u32_f32(n.v), 23)))};
}
inline float sum(Floats a) { return vaddvq_f32(a.v); }
inline float highest(Floats a) { return vmaxvq_f32(a.v); }
inline float first(Floats a) { return vgetq_lane_f32(a.v, 0); }

}  // namespace
}  // namespace fastalign
