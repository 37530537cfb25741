/* The public headers from C99, and one small head by hand. */
#include "fastalign_rows.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

static void expect(int holds, const char *what) {
    if (!holds) {
        printf("failed: %s\n", what);
        ++failures;
    }
}

int main(void) {
    /* Two rows of three columns; logits (0, log 2, log 5), so that probabilities are 1/8, 2/8, 5/8. */
    const float l2 = logf(2.0f), l5 = logf(5.0f);
    float x[2][4] = {{0.0f, l2, l5, 77.0f}, {0.0f, l2, l5, 77.0f}};
    const int64_t target[2] = {2, 0};
    float found[2] = {NAN, NAN}, m[2] = {-INFINITY, -INFINITY}, s[2] = {0, 0}, z_sum[2] = {0, 0};
    fastalign_tile tile = {x, FASTALIGN_FLOAT32, 2, 3, 4, 0, target};
    fastalign_logit_map logits = {NULL, NULL, 1.0f, 1.0f, 0.0f};
    fastalign_row_state state = {found, m, s, NULL, NULL, z_sum};

    expect(fastalign_version() == FASTALIGN_VERSION, "header and library are of one version");
    expect(fastalign_select_isa("scalar") == FASTALIGN_OK && !strcmp(fastalign_isa(), "scalar"), "scalar is always there");
    expect(fastalign_select_isa("mmx") == FASTALIGN_UNSUPPORTED && !strcmp(fastalign_isa(), "scalar"), "unknown sets are refused");
    expect(fastalign_select_isa(NULL) == FASTALIGN_BAD_ARGUMENT, "null is no instruction set");
    expect(fastalign_select_isa("best") == FASTALIGN_OK, "the best one is back");
    expect(strlen(fastalign_threading()) > 0, "threading has a name");

    expect(fastalign_rows_update(&tile, &logits, &state, 2) == FASTALIGN_OK, "update");
    expect(m[0] == l5 && found[0] == l5 && found[1] == 0.0f, "maximum and target are exact");
    expect(fabsf(s[0] - 8.0f / 5.0f) < 1e-6f, "sum of exp(z - m)");
    expect(fabsf(z_sum[1] - l2 - l5) < 1e-6f, "sum of logits");

    {
        const float lse[2] = {logf(8.0f), logf(8.0f)}, c[2] = {1.0f, -2.0f};
        fastalign_row_gradient gradient = {lse, NULL, c, NULL, NULL, NULL, 3, FASTALIGN_FLOAT32};
        const float want[2][3] = {{-1.0f / 8, -2.0f / 8, 3.0f / 8}, {-2 * 7.0f / 8, 4.0f / 8, 10.0f / 8}};
        int r, v;
        expect(fastalign_rows_gradient(&tile, &logits, &gradient, 1) == FASTALIGN_OK, "gradient");
        for (r = 0; r < 2; ++r) {
            for (v = 0; v < 3; ++v) expect(fabsf(x[r][v] - want[r][v]) < 1e-6f, "c (onehot - p)");
            expect(x[r][3] == 77.0f, "what lies behind a row stays");
        }
        gradient.c_entropy = c;
        expect(fastalign_rows_gradient(&tile, &logits, &gradient, 1) == FASTALIGN_BAD_ARGUMENT, "entropy is needed");
        gradient.c_entropy = NULL;
        gradient.vocabulary = 2;
        expect(fastalign_rows_gradient(&tile, &logits, &gradient, 1) == FASTALIGN_BAD_ARGUMENT, "a tile exceeds its row");
        gradient.vocabulary = 3;
        tile.dtype = FASTALIGN_BFLOAT16;
        expect(fastalign_rows_gradient(&tile, &logits, &gradient, 1) == FASTALIGN_UNSUPPORTED, "a result wider than its tile");
        tile.dtype = 9;
        expect(fastalign_rows_update(&tile, &logits, &state, 1) == FASTALIGN_UNSUPPORTED, "unknown element type");
        tile.dtype = FASTALIGN_FLOAT32;
    }
    tile.row_stride = 2;
    expect(fastalign_rows_update(&tile, &logits, &state, 1) == FASTALIGN_BAD_ARGUMENT, "rows overlap");
    tile.row_stride = 4;
    tile.target = NULL;
    expect(fastalign_rows_update(&tile, &logits, &state, 1) == FASTALIGN_BAD_ARGUMENT, "a null pointer");
    expect(fastalign_rows_update(NULL, &logits, &state, 1) == FASTALIGN_BAD_ARGUMENT, "no tile");
    tile.rows = 0;
    expect(fastalign_rows_update(&tile, &logits, &state, 1) == FASTALIGN_OK, "no rows");
    return failures != 0;
}
