// `Floats` without any vector instruction: the definition of what the other vector_*.h provide.
//
// Each of those files defines, in an unnamed namespace because every instruction set compiles the kernels for itself:
//   Floats                      LANES numbers; + - * / by element
//   all(x)                      x in every lane
//   load(p), store(p, a)        float, BF16 or FP16 elements, unaligned; rounding to nearest even, NaN stays NaN
//   fma(a, b, c)                a b + c, with or without a rounding between
//   larger(a, b)                a > b ? a : b, so b where either is NaN
//   where_less(a, b, x, y)      a < b ? x : y
//   magnitude(a), with_sign(a, s)
//   add_exponent(a, n)          a with the low bits of n's representation added to its exponent
//   sum(a), highest(a), first(a)   over lanes; `highest` of numbers that are not NaN
#pragma once

#include <cstring>

#include "elements.h"

namespace fastalign {
namespace {

constexpr int LANES = 4;

struct Floats {
    float v[LANES];
};

inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}

inline float widen(BF16 a) { return float_of(static_cast<uint32_t>(a.bits) << 16); }

inline float widen(FP16 a) {
    const uint32_t sign = (a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // The exponent's bias differs by 112; a product with 2^112 also makes subnormals normal.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline void narrow(float a, BF16 &to) {
    const uint32_t bits = bits_of(a);
    to.bits = a != a ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float a, FP16 &to) {
    const uint32_t bits = bits_of(a), rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00;
    } else if (rest >= 0x47800000u) {  // 2^16 and above
        half = 0x7c00;
    } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
    }
    to.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

template <class F>
inline Floats each(F f) {
    Floats r;
    for (int i = 0; i < LANES; ++i) r.v[i] = f(i);
    return r;
}

inline Floats operator+(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats operator-(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats operator*(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats operator/(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats all(float x) { return each([&](int) { return x; }); }

inline Floats load(const float *p) {
    Floats r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}

inline void store(float *p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }

template <class Half>
inline Floats load(const Half *p) {
    return each([&](int i) { return widen(p[i]); });
}

template <class Half>
inline void store(Half *p, Floats a) {
    Half r[LANES];
    for (int i = 0; i < LANES; ++i) narrow(a.v[i], r[i]);
    std::memcpy(p, r, sizeof r);
}

inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats larger(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats where_less(Floats a, Floats b, Floats x, Floats y) {
    return each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline Floats magnitude(Floats a) { return each([&](int i) { return float_of(bits_of(a.v[i]) & 0x7fffffffu); }); }
inline Floats with_sign(Floats a, Floats s) {
    return each([&](int i) { return float_of((bits_of(a.v[i]) & 0x7fffffffu) | (bits_of(s.v[i]) & 0x80000000u)); });
}
inline Floats add_exponent(Floats a, Floats n) {
    return each([&](int i) { return float_of(bits_of(a.v[i]) + (bits_of(n.v[i]) << 23)); });
}
inline float sum(Floats a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float highest(Floats a) {
    float r = a.v[0];
    for (int i = 1; i < LANES; ++i) r = a.v[i] > r ? a.v[i] : r;
    return r;
}
inline float first(Floats a) { return a.v[0]; }

}  // namespace
}  // namespace fastalign
