/* The product through its C interface alone: values against double precision, operands that end where readable memory
 * ends, results beside which nothing may be written, the same bits from any number of threads, and what is refused. */
#define _DEFAULT_SOURCE
#include "fastalign_gemm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int failures = 0;

#define CHECK(condition, ...)                                      \
    do {                                                           \
        if (!(condition)) {                                        \
            ++failures;                                            \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            printf(__VA_ARGS__);                                   \
            printf("\n");                                          \
        }                                                          \
    } while (0)

/* Memory of `bytes` that ends at a page which cannot be read. It is never freed: the test is short. */
static void *at_the_end_of_a_page(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char *start = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + whole, page, PROT_NONE)) {
        printf("no memory for the test\n");
        exit(2);
    }
    return start + whole - bytes;
}

static uint32_t state = 1;

static uint32_t random_bits(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static float value_of(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* A random bfloat16 of magnitude 2^-3 to 2^2, of either sign. */
static uint16_t random_bf16(void) {
    const uint32_t r = random_bits();
    return (uint16_t)((r & 1) << 15 | (124 + (r >> 1) % 5) << 7 | (r >> 8 & 0x7f));
}

/* (rows, columns) by rows, or by columns, with `gap` elements between neighbouring rows or columns. */
static fastalign_bf16_matrix random_matrix(int64_t rows, int64_t columns, int by_rows, int64_t gap) {
    const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows, step = length + gap;
    const size_t count = (size_t)((lines - 1) * step + length);
    uint16_t *data = at_the_end_of_a_page(count * sizeof *data);
    for (size_t i = 0; i < count; ++i) data[i] = random_bf16();
    const fastalign_bf16_matrix x = {data, by_rows ? step : 1, by_rows ? 1 : step};
    return x;
}

static double element(const fastalign_bf16_matrix *x, int64_t i, int64_t j) {
    return value_of(x->data[i * x->row_stride + j * x->column_stride]);
}

static void compare(int64_t m, int64_t n, int64_t k, int layout, int accumulate, int threads) {
    const int64_t step = n + 3;
    const size_t count = (size_t)((m - 1) * step + n);
    const fastalign_bf16_matrix a = random_matrix(m, k, layout & 1, layout & 4 ? 7 : 0);
    const fastalign_bf16_matrix b = random_matrix(k, n, layout >> 1 & 1, layout & 4 ? 5 : 0);
    float *c = at_the_end_of_a_page(count * sizeof *c), *before = malloc(count * sizeof *c);
    for (size_t i = 0; i < count; ++i) before[i] = c[i] = (float)random_bits() / 1e6f;
    const int status = fastalign_gemm_bf16(m, n, k, &a, &b, c, step, accumulate, threads);
    CHECK(status == FASTALIGN_OK, "status %d", status);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < step && i * step + j < (int64_t)count; ++j) {
            const float was = before[i * step + j], is = c[i * step + j];
            if (j >= n) {
                CHECK(was == is, "written beside row %d at %d", (int)i, (int)j);
                continue;
            }
            double gold = accumulate ? was : 0, size = 0;
            for (int64_t p = 0; p < k; ++p) {
                const double term = element(&a, i, p) * element(&b, p, j);
                gold += term;
                size += fabs(term);
            }
            const double allowed = ldexp((double)(k < 1024 ? k : 1024) + (double)k / 1024 + 2, -24) * (size + fabs(was));
            CHECK(
                fabs(is - gold) <= allowed, "(%d, %d, %d) layout %d at %d, %d: %.9g, should be %.9g", (int)m, (int)n, (int)k, layout,
                (int)i, (int)j, is, gold);
            if (failures > 10) exit(1);
        }
    }
    memcpy(c, before, count * sizeof *c);
    float *again = malloc(count * sizeof *c);
    memcpy(again, before, count * sizeof *c);
    for (int i = 0; i < 2; ++i) fastalign_gemm_bf16(m, n, k, &a, &b, i ? again : c, step, accumulate, i ? 1 : 5);
    CHECK(!memcmp(c, again, count * sizeof *c), "1 and 5 threads differ at (%d, %d, %d)", (int)m, (int)n, (int)k);
    free(again);
    free(before);
}

static void refusals(void) {
    const fastalign_bf16_matrix a = random_matrix(2, 2, 1, 0), b = random_matrix(2, 2, 1, 0), none = {NULL, 1, 1};
    fastalign_bf16_matrix strided = a;
    strided.row_stride = strided.column_stride = 2;
    float c[4] = {1, 2, 3, 4};
    CHECK(fastalign_gemm_bf16(-1, 2, 2, &a, &b, c, 2, 0, 1) == FASTALIGN_BAD_ARGUMENT, "negative size");
    CHECK(fastalign_gemm_bf16(2, 2, 2, NULL, &b, c, 2, 0, 1) == FASTALIGN_BAD_ARGUMENT, "no a");
    CHECK(fastalign_gemm_bf16(2, 2, 2, &a, &none, c, 2, 0, 1) == FASTALIGN_BAD_ARGUMENT, "no elements");
    CHECK(fastalign_gemm_bf16(2, 2, 2, &strided, &b, c, 2, 0, 1) == FASTALIGN_BAD_ARGUMENT, "two strides of 2");
    CHECK(fastalign_gemm_bf16(2, 2, 2, &a, &b, NULL, 2, 0, 1) == FASTALIGN_BAD_ARGUMENT, "no c");
    CHECK(fastalign_gemm_bf16(2, 2, 2, &a, &b, c, 1, 0, 1) == FASTALIGN_BAD_ARGUMENT, "rows of c that overlap");
    CHECK(c[0] == 1 && c[1] == 2 && c[2] == 3 && c[3] == 4, "a refusal wrote");
    CHECK(fastalign_gemm_bf16(2, 2, 0, &none, &none, c, 2, 1, 1) == FASTALIGN_OK && c[3] == 4, "adding an empty product");
    CHECK(fastalign_gemm_bf16(2, 2, 0, &none, &none, c, 2, 0, 1) == FASTALIGN_OK && c[0] == 0 && c[3] == 0, "an empty product");
    CHECK(fastalign_gemm_bf16(0, 2, 2, &none, &b, NULL, 2, 0, 1) == FASTALIGN_OK, "no rows");
    CHECK(fastalign_select_isa("scalar") == FASTALIGN_OK && !fastalign_gemm_bf16_supported(), "the scalar set has no product");
    CHECK(fastalign_gemm_bf16(2, 2, 2, &a, &b, c, 2, 0, 1) == FASTALIGN_UNSUPPORTED, "the scalar set has no product");
    fastalign_select_isa("best");
}

int main(void) {
    if (!fastalign_gemm_bf16_supported()) {
        const fastalign_bf16_matrix x = random_matrix(1, 1, 1, 0);
        float c = 0;
        CHECK(fastalign_gemm_bf16(1, 1, 1, &x, &x, &c, 1, 0, 1) == FASTALIGN_UNSUPPORTED, "an unsupported product");
        printf("no AVX512-BF16: the product is unproven here\n");
        return failures ? 1 : 77; /* 77: skipped */
    }
    refusals();
    const int64_t sizes[][3] = {{1, 1, 1}, {8, 48, 32}, {7, 17, 15}, {33, 49, 17}, {65, 131, 31}, {17, 200, 1025}, {140, 67, 2100}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i)
        for (int layout = 0; layout < 8; ++layout) compare(sizes[i][0], sizes[i][1], sizes[i][2], layout, (layout + (int)i) % 2, 2);
    for (int i = 0; i < 60; ++i)
        compare(1 + random_bits() % 90, 1 + random_bits() % 120, 1 + random_bits() % 150, i % 8, i % 3 == 0, 1 + i % 4);
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
