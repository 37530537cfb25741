// exp and tanh over `Floats`, which the including file has defined.
#pragma once

#include <limits>

namespace fastalign {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// At most 1.1 ulp off for x in [-87.33, 88.37]; 0 below, infinite above, NaN for NaN. No subnormal results: they are
// slow on many processors, and beside a probability that matters they are 0.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) = 1 + r + r^2 P(r), P by minimax (relative error 3.1e-9). ln 2 is taken in two
// parts of which the first has 9 bits, so that n times it is exact without an FMA, too.
inline Floats exp(Floats x) {
    const Floats magic = all(12582912.0f);  // 1.5 2^23: a sum with it is rounded to an integer, found in its low bits
    const Floats shifted = fma(x, all(1.44269504f), magic);
    const Floats n = shifted - magic;
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = fma(r, all(1.38145986e-3f), all(8.36871688e-3f));
    p = fma(p, r, all(4.16683880e-2f));
    p = fma(p, r, all(1.66665206e-1f));
    p = fma(p, r, all(4.99999934e-1f));
    p = fma(p, r * r, r) + all(1.0f);
    const Floats y = add_exponent(p, shifted);
    return where_less(x, all(-87.33f), all(0.0f), where_less(all(88.37f), x, all(INFINITE), y));
}

// At most 1.5 ulp off. Below 0.625 an odd minimax polynomial (relative error 4.4e-9), above it 1 - 2 / (exp(2 |x|) + 1).
inline Floats tanh(Floats x) {
    const Floats size = magnitude(x), x2 = size * size;
    Floats p = fma(x2, all(-5.70498746e-3f), all(2.06390877e-2f));
    p = fma(p, x2, all(-5.37397152e-2f));
    p = fma(p, x2, all(1.33314422e-1f));
    p = fma(p, x2, all(-3.33332819e-1f));
    const Floats small = fma(p * x2, size, size);
    const Floats large = all(1.0f) - all(2.0f) / (exp(size + size) + all(1.0f));
    return with_sign(where_less(size, all(0.625f), small, large), x);
}

}  // namespace
}  // namespace fastalign
