// Random tiles of random shapes, strides, types and options on every instruction set of this machine, against the formulas of
// fastalign_rows.h in double. Every buffer is allocated to its last element, so that a sanitizer sees a step beyond it.
//
//     fuzz_rows [cases] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "fastalign_rows.h"

namespace {

std::mt19937_64 generator;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
float normal(float scale) { return std::normal_distribution<float>(0.0f, scale)(generator); }

float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

double read_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -size : size;
}

// Elements of one of the three types, in memory of exactly their size.
struct Elements {
    int32_t dtype;
    std::vector<char> bytes;
    int64_t width() const { return dtype == FASTALIGN_FLOAT32 ? 4 : 2; }
    double read(int64_t i, int32_t as) const {
        if (as == FASTALIGN_FLOAT32) {
            float x;
            std::memcpy(&x, bytes.data() + 4 * i, 4);
            return x;
        }
        uint16_t half;
        std::memcpy(&half, bytes.data() + 2 * i, 2);
        return as == FASTALIGN_BFLOAT16 ? static_cast<double>(as_float(static_cast<uint32_t>(half) << 16)) : read_half(half);
    }
    void write(int64_t i, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (dtype == FASTALIGN_FLOAT16) {  // a multiple of 1/16 below 64: exact
            const float size = std::min(std::fabs(std::round(x * 16) / 16), 63.0f);
            int exponent;
            const float fraction = std::frexp(size, &exponent);
            half = size == 0 ? 0 : static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 1023));
            if (x < 0) half |= 0x8000;
        }
        std::memcpy(bytes.data() + width() * i, dtype == FASTALIGN_FLOAT32 ? static_cast<void *>(&x) : &half, width());
    }
};

int failures = 0;

void near(double got, double want, double bound, const char *what, const char *isa, uint64_t number) {
    if (std::fabs(got - want) <= bound || (std::isnan(got) && std::isnan(want)) || got == want) return;
    if (failures++ < 20) std::printf("case %llu, %s: %s is %g, not %g\n", (unsigned long long)number, isa, what, got, want);
}

void one_case(uint64_t number, const char *isa, int threads) {
    const bool large = chance(0.03);  // enough for several threads
    const int64_t rows = large ? between(70, 90) : between(0, 6);
    const int64_t columns = large ? between(2000, 2600) : chance(0.3) ? between(0, 40) : between(1, 2600), stride = columns + between(0, 9);
    const int64_t before = between(0, 50), vocabulary = before + columns + between(0, 50);
    Elements x{static_cast<int32_t>(between(0, 2)), {}};
    x.bytes.resize(static_cast<size_t>(rows ? ((rows - 1) * stride + columns) * x.width() : 0));
    for (int64_t i = 0; i < static_cast<int64_t>(x.bytes.size()) / x.width(); ++i) x.write(i, normal(4.0f));
    std::vector<int64_t> target(rows);
    for (auto &t : target) t = chance(0.8) ? before + between(0, std::max<int64_t>(0, columns - 1)) : between(-5, vocabulary);
    std::vector<float> bias(chance(0.5) ? columns : 0), temperature(chance(0.5) ? rows : 0);
    for (auto &b : bias) b = chance(0.05) ? -std::numeric_limits<float>::infinity() : normal(1.0f);
    for (auto &t : temperature) t = 0.5f + std::fabs(normal(0.5f));
    const fastalign_logit_map logits = {bias.empty() ? nullptr : bias.data(), temperature.empty() ? nullptr : temperature.data(),
                                        chance(0.5) ? 1.0f : 0.7f, chance(0.5) ? 1.0f : 1.3f, chance(0.3) ? 8.0f : 0.0f};
    const fastalign_tile tile = {x.bytes.data(), x.dtype, rows, columns, stride, before, target.data()};

    // Statistics, beginning with those of one column z = 0.5.
    const bool with_t = chance(0.5), with_q = chance(0.5), with_sum = chance(0.5);
    std::vector<float> found(rows, NAN), m(rows, 0.5f), s(rows, 1.0f), t(with_t ? rows : 0, 0.0f), q(with_q ? rows : 0, 1.0f);
    std::vector<float> z_sum(with_sum ? rows : 0, 0.5f);
    const auto given = [](std::vector<float> &values) { return values.empty() ? nullptr : values.data(); };
    const fastalign_row_state state = {found.data(), m.data(), s.data(), given(t), given(q), given(z_sum)};
    if (fastalign_rows_update(&tile, &logits, &state, threads)) near(1, 0, 0, "status of update", isa, number);

    std::vector<std::vector<double>> z(rows, std::vector<double>(columns)), slope = z;
    std::vector<float> lse(rows), entropy(rows);
    for (int64_t r = 0; r < rows; ++r) {
        const double inverse = temperature.empty() ? logits.common_inv_temperature : temperature[r];
        double top = 0.5, total = 0, weighted = 0, squares = 0, sum = 0.5;
        for (int64_t c = 0; c < columns; ++c) {
            const double y = logits.logit_scale * (x.read(r * stride + c, x.dtype) + (bias.empty() ? 0.0 : bias[c]));
            const double u = logits.softcap ? std::tanh(y / logits.softcap) : 0.0;
            z[r][c] = (logits.softcap ? logits.softcap * u : y) * inverse;
            slope[r][c] = logits.logit_scale * inverse * (1 - u * u);
            top = std::max(top, z[r][c]);
            sum += z[r][c];
        }
        const auto add = [&](double value) {
            const double e = std::exp(value - top);
            total += e, squares += e * e;
            if (e > 0) weighted += e * (value - top);
        };
        add(0.5);
        for (const double value : z[r]) add(value);
        const double small = 4e-6 * std::max(1.0, std::fabs(top));
        near(m[r], top, small, "m", isa, number);
        near(s[r], total, small * total, "s", isa, number);
        if (with_t) near(t[r], weighted, small * (total + std::fabs(weighted)), "t", isa, number);
        if (with_q) near(q[r], squares, 2 * small * squares, "q", isa, number);
        if (with_sum) near(z_sum[r], sum, 4e-6 * 16 * std::sqrt(columns + 1.0) * 8, "z_sum", isa, number);
        const int64_t at = target[r] - before;
        const bool here = at >= 0 && at < columns;
        near(found[r], here ? z[r][at] : NAN, here ? 4e-6 * std::max(1.0, std::fabs(z[r][at])) : 0, "target_logit", isa, number);
        lse[r] = static_cast<float>(top + std::log(total));
        entropy[r] = static_cast<float>(std::log(total) - weighted / total);
    }

    // The gradient, in the tile's own type or, for float32, in any.
    std::vector<float> c[4];
    for (auto &values : c) {
        if (!chance(0.6)) continue;
        for (int64_t r = 0; r < rows; ++r) values.push_back(normal(1.0f));
    }
    const int32_t dtype = x.dtype == FASTALIGN_FLOAT32 ? static_cast<int32_t>(between(0, 2)) : x.dtype;
    const fastalign_row_gradient gradient = {lse.data(), entropy.data(), given(c[0]), given(c[1]),
                                             given(c[2]), given(c[3]),   vocabulary,  dtype};
    const Elements original = x;
    if (fastalign_rows_gradient(&tile, &logits, &gradient, threads)) near(1, 0, 0, "status of gradient", isa, number);
    const auto of = [](const std::vector<float> &values, int64_t r) { return values.empty() ? 0.0 : values[r]; };
    const double eps = dtype == FASTALIGN_FLOAT32 ? 0.0 : dtype == FASTALIGN_BFLOAT16 ? 1.0 / 256 : 1.0 / 2048;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t step = dtype == x.dtype ? stride : 2 * stride, at = c[0].empty() ? -1 : target[r] - before;
        for (int64_t v = 0; v < columns; ++v) {
            const double log_p = std::max(-1e4, z[r][v] - lse[r]), p = std::exp(log_p);
            double want = (of(c[1], r) - of(c[0], r)) * p + of(c[3], r) / vocabulary + (v == at ? of(c[0], r) : 0.0);
            if (!c[2].empty()) want -= of(c[2], r) * p * (log_p + entropy[r]);
            want *= slope[r][v];
            near(x.read(r * step + v, dtype), want, 1e-4 + eps * std::fabs(want), "gradient", isa, number);
        }
        const int64_t end = (r * stride + columns) * x.width(), next = (r + 1) * stride * x.width();
        if (r + 1 < rows && std::memcmp(x.bytes.data() + end, original.bytes.data() + end, static_cast<size_t>(next - end))) {
            near(1, 0, 0, "what lies between rows", isa, number);
        }
    }
}

}  // namespace

int main(int count, char **arguments) {
    const uint64_t cases = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 400;
    const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
    for (const char *isa : {"avx512", "avx2", "neon", "scalar"}) {
        if (fastalign_select_isa(isa)) continue;
        for (uint64_t number = 0; number < cases; ++number) {
            generator.seed(seed + number);
            one_case(seed + number, isa, static_cast<int>(1 + number % 3));
        }
        std::printf("%s: %llu cases\n", isa, static_cast<unsigned long long>(cases));
    }
    if (failures) std::printf("%d values are wrong\n", failures);
    return failures != 0;
}
