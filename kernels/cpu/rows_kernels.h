// The row kernels, written once over `Floats`; each instruction set compiles them with its own (vector_*.h).
//
// Everything is in an unnamed namespace, and no inline function of the C++ library is called: a linker that merged copies
// across instruction sets could keep one that this machine cannot run.
#pragma once

#include <cstring>

#include "elementary.h"
#include "rows_table.h"

namespace fastalign {
namespace {

constexpr int BLOCK = 1024;       // columns at a time: their logits stay in L1, and float32 sums over them stay exact enough
constexpr float LOWEST = -1e4f;  // stands for -infinity where it is multiplied by a probability: exp(LOWEST) is 0
static_assert(BLOCK % LANES == 0, "a block is whole vectors");

// z = outer u, where u = tanh(inner (x + bias)) if capped, else x + bias.
struct Map {
    const float *bias;
    float inner, outer;
    bool capped;
};

Map map_of(const fastalign_logit_map &logits, int64_t row) {
    const float inv_temperature = logits.inv_temperature ? logits.inv_temperature[row] : logits.common_inv_temperature;
    if (logits.softcap == 0.0f) return {logits.bias, 1.0f, inv_temperature * logits.logit_scale, false};
    return {logits.bias, logits.logit_scale / logits.softcap, inv_temperature * logits.softcap, true};
}

// n < LANES elements, and zeros.
template <class X>
Floats load_part(const X *x, int n) {
    X part[LANES] = {};
    std::memcpy(part, x, n * sizeof(X));
    return load(part);
}

template <class X>
void store_part(X *x, Floats a, int n) {
    X part[LANES];
    store(part, a);
    std::memcpy(x, part, n * sizeof(X));
}

template <bool CAPPED>
inline Floats mapped(Floats x, float inner) {
    if (!CAPPED) return x;
    return tanh(all(inner) * x);
}

// z of n <= BLOCK columns, followed by -infinity up to a whole vector: in `buffer`, or x itself where nothing lies between.
template <bool CAPPED, class X>
const float *logits_of(const X *x, const Map &map, int64_t start, int n, float *buffer) {
    const Floats outer = all(map.outer);
    const float *bias = map.bias ? map.bias + start : nullptr;
    int c = 0;
    for (; c + LANES <= n; c += LANES) {
        Floats u = load(x + start + c);
        if (bias) u = u + load(bias + c);
        store(buffer + c, outer * mapped<CAPPED>(u, map.inner));
    }
    if (c < n) {
        Floats u = load_part(x + start + c, n - c);
        if (bias) u = u + load_part(bias + c, n - c);
        store(buffer + c, outer * mapped<CAPPED>(u, map.inner));
        for (int k = n; k < c + LANES; ++k) buffer[k] = -INFINITE;
    }
    return buffer;
}

template <class X>
const float *logits_of(const X *x, const Map &map, int64_t start, int n, float *buffer) {
    return map.capped ? logits_of<true>(x, map, start, n, buffer) : logits_of<false>(x, map, start, n, buffer);
}

const float *logits_of(const float *x, const Map &map, int64_t start, int n, float *buffer) {
    if (!map.bias && !map.capped && map.outer == 1.0f && n % LANES == 0) return x + start;
    return map.capped ? logits_of<true>(x, map, start, n, buffer) : logits_of<false>(x, map, start, n, buffer);
}

// The largest of n numbers and what pads them; NaN is passed over.
float highest(const float *z, int n) {
    Floats a = all(-INFINITE), b = a;
    int c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) {
        a = larger(load(z + c), a);
        b = larger(load(z + c + LANES), b);
    }
    for (; c < n; c += LANES) a = larger(load(z + c), a);
    return highest(larger(a, b));
}

float total(const float *z, int n) {
    Floats a = all(0.0f);
    int c = 0;
    for (; c + LANES <= n; c += LANES) a = a + load(z + c);
    float rest = 0.0f;
    for (; c < n; ++c) rest += z[c];
    return sum(a) + rest;
}

struct Sums {
    float s, t, q;
};

// Over n numbers and what pads them, of exp(z - centre): its sum, the sum of its products with z - centre, of its squares.
template <bool WITH_T, bool WITH_Q>
Sums sums(const float *z, int n, float centre) {
    Floats s = all(0.0f), t = s, q = s;
    for (int c = 0; c < n; c += LANES) {
        const Floats centred = load(z + c) - all(centre), e = exp(centred);
        s = s + e;
        if (WITH_T) t = fma(larger(all(LOWEST), centred), e, t);
        if (WITH_Q) q = fma(e, e, q);
    }
    return {sum(s), WITH_T ? sum(t) : 0.0f, WITH_Q ? sum(q) : 0.0f};
}

template <class X>
bool holds_nan(const X *x, int64_t columns, const Map &map) {
    float buffer[BLOCK];
    for (int64_t start = 0; start < columns; start += BLOCK) {
        const int n = static_cast<int>(columns - start < BLOCK ? columns - start : BLOCK);
        const float *z = logits_of(x, map, start, n, buffer);
        for (int c = 0; c < n; ++c) {
            if (z[c] != z[c]) return true;
        }
    }
    return false;
}

template <class X>
void update_row(const X *x, const fastalign_tile &tile, const Map &map, const fastalign_row_state &state, int64_t row) {
    float buffer[BLOCK];
    const auto sums_of = state.t ? (state.q ? sums<true, true> : sums<true, false>) : (state.q ? sums<false, true> : sums<false, false>);
    const int64_t at = tile.target[row] - tile.first;
    bool nan = state.m[row] != state.m[row];
    float m = nan ? -INFINITE : state.m[row];
    double s = state.s[row], t = state.t ? state.t[row] : 0.0, q = state.q ? state.q[row] : 0.0;
    double z_sum = state.z_sum ? state.z_sum[row] : 0.0;
    for (int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int n = static_cast<int>(tile.columns - start < BLOCK ? tile.columns - start : BLOCK);
        const float *z = logits_of(x, map, start, n, buffer);
        if (at >= start && at < start + n) state.target_logit[row] = z[at - start];
        const float top = highest(z, n);
        if (top > m) {
            const float shift = m - top, decay = first(exp(all(shift)));
            t = decay * (t + (shift < LOWEST ? LOWEST : shift) * s);
            q *= decay * decay;
            s *= decay;
            m = top;
        }
        const Sums block = sums_of(z, n, m == -INFINITE ? 0.0f : m);  // a row of -infinity so far stays at s = 0
        s += block.s;
        t += block.t;
        q += block.q;
        if (state.z_sum) z_sum += total(z, n);
    }
    if (s != s && !nan) nan = holds_nan(x, tile.columns, map);  // else it is infinity - infinity
    state.m[row] = nan ? std::numeric_limits<float>::quiet_NaN() : m;
    state.s[row] = static_cast<float>(s);
    if (state.t) state.t[row] = static_cast<float>(t);
    if (state.q) state.q[row] = static_cast<float>(q);
    if (state.z_sum) state.z_sum[row] = static_cast<float>(z_sum);
}

// What the gradient needs to know of a row.
struct RowGradient {
    float lse, entropy, c_p, c_entropy, c_mean, c_logps;
    bool with_p;  // else even a probability of NaN has no part in it
};

// dL/dx of raw products with their bias; `added` is the part of dL/dz that is no multiple of p.
template <bool CAPPED, bool ENTROPY>
inline Floats gradient_of(Floats x, const Map &map, const RowGradient &row, float added) {
    const Floats u = mapped<CAPPED>(x, map.inner);
    Floats d = all(added);
    if (row.with_p) {
        const Floats log_p = all(map.outer) * u - all(row.lse);
        Floats c = all(row.c_p);
        if (ENTROPY) c = c - all(row.c_entropy) * (larger(all(LOWEST), log_p) + all(row.entropy));
        d = fma(c, exp(log_p), d);
    }
    return CAPPED ? d * (all(map.outer * map.inner) * (all(1.0f) - u * u)) : d * all(map.outer);
}

// From left to right: a narrow result covers columns that have been read.
template <bool CAPPED, bool ENTROPY, class X, class D>
void gradient_row(const X *x, D *d, int64_t columns, int64_t at, const Map &map, const RowGradient &row) {
    const bool here = at >= 0 && at < columns;
    Floats hit = all(0.0f);
    if (here) {
        hit = load_part(x + at, 1);
        if (map.bias) hit = hit + load_part(map.bias + at, 1);
        hit = gradient_of<CAPPED, ENTROPY>(hit, map, row, row.c_mean + row.c_logps);
    }
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        Floats y = load(x + c);
        if (map.bias) y = y + load(map.bias + c);
        store(d + c, gradient_of<CAPPED, ENTROPY>(y, map, row, row.c_mean));
    }
    if (c < columns) {
        const int n = static_cast<int>(columns - c);
        Floats y = load_part(x + c, n);
        if (map.bias) y = y + load_part(map.bias + c, n);
        store_part(d + c, gradient_of<CAPPED, ENTROPY>(y, map, row, row.c_mean), n);
    }
    if (here) store_part(d + at, hit, 1);
}

template <class X, class D>
void gradient_row(const fastalign_tile &tile, const Map &map, const fastalign_row_gradient &given, int64_t r) {
    X *x = static_cast<X *>(tile.x) + r * tile.row_stride;
    const auto of = [r](const float *values) { return values ? values[r] : 0.0f; };
    RowGradient row;
    row.lse = given.lse[r];
    row.entropy = of(given.entropy);
    row.c_logps = of(given.c_logps);
    row.c_p = of(given.c_lse) - row.c_logps;
    row.c_entropy = of(given.c_entropy);
    row.c_mean = of(given.c_mean) / static_cast<float>(given.vocabulary);
    row.with_p = given.c_logps || given.c_lse || given.c_entropy;
    const int64_t at = given.c_logps ? tile.target[r] - tile.first : -1;
    const auto run = map.capped ? (given.c_entropy ? gradient_row<true, true, X, D> : gradient_row<true, false, X, D>)
                                : (given.c_entropy ? gradient_row<false, true, X, D> : gradient_row<false, false, X, D>);
    run(x, reinterpret_cast<D *>(x), tile.columns, at, map, row);
}

void update(const fastalign_tile &tile, const fastalign_logit_map &logits, const fastalign_row_state &state, int64_t row) {
    const Map map = map_of(logits, row);
    const int64_t from = row * tile.row_stride;
    switch (tile.dtype) {
        case FASTALIGN_FLOAT32: return update_row(static_cast<const float *>(tile.x) + from, tile, map, state, row);
        case FASTALIGN_BFLOAT16: return update_row(static_cast<const BF16 *>(tile.x) + from, tile, map, state, row);
        case FASTALIGN_FLOAT16: return update_row(static_cast<const FP16 *>(tile.x) + from, tile, map, state, row);
    }
}

void gradient(const fastalign_tile &tile, const fastalign_logit_map &logits, const fastalign_row_gradient &given, int64_t row) {
    const Map map = map_of(logits, row);
    if (tile.dtype == FASTALIGN_BFLOAT16) return gradient_row<BF16, BF16>(tile, map, given, row);
    if (tile.dtype == FASTALIGN_FLOAT16) return gradient_row<FP16, FP16>(tile, map, given, row);
    switch (given.dtype) {
        case FASTALIGN_FLOAT32: return gradient_row<float, float>(tile, map, given, row);
        case FASTALIGN_BFLOAT16: return gradient_row<float, BF16>(tile, map, given, row);
        case FASTALIGN_FLOAT16: return gradient_row<float, FP16>(tile, map, given, row);
    }
}

template <Floats (*F)(Floats)>
void each_element(const float *x, float *y, int64_t n) {
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) store(y + c, F(load(x + c)));
    if (c < n) store_part(y + c, F(load_part(x + c, static_cast<int>(n - c))), static_cast<int>(n - c));
}

void each_exp(const float *x, float *y, int64_t n) { each_element<exp>(x, y, n); }
void each_tanh(const float *x, float *y, int64_t n) { each_element<tanh>(x, y, n); }

}  // namespace
}  // namespace fastalign
