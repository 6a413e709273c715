/* Layer normalization row by row, equal to `integer_layer_norm` of quant/integer_functions.py. */

#include <stdlib.h>

#include "arithmetic.h"

#define LAYER_NORM_NUDGE (1 + 0x1p-46)

CLONES static void norm_row(const int16_t *restrict x, int32_t *restrict out, const LayerNorm *job) {
    const int n = job->count;
    int64_t sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    for (int i = 0; i < n; i++) squares += (int64_t)((int32_t)x[i] * x[i]);
    const double total = (double)sum, spread = (double)(squares * n - sum * sum);
    const double ceiling = spread + job->eps_ceiling;
    const int64_t k = (52 - (ceiling > 0 ? length_of(ceiling) : 0)) / 2;
    double variance = spread * power_of_two(2 * k) + job->eps[k];
    variance = clip(variance, 1, 0x1p52 - 1);
    const double factor = power_of_two(k + 12) / integer_root(variance) * LAYER_NORM_NUDGE;
    for (int i = 0; i < n; i++) {
        const double normalized = rint((x[i] * (double)n - total) * factor);
        const double scaled = half_away(normalized * job->multiplier[i]) * job->sign[i] + job->offset[i];
        out[i] = (int32_t)clip(scaled, job->low[i], job->high[i]);
    }
}

int layer_norm(const LayerNorm *job) {
    int failed = 0;
#pragma omp parallel num_threads(job->threads)
    {
        int32_t *row = malloc(sizeof(int32_t) * job->count);
        if (!row) failed = 1;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < job->rows; r++) {
            if (failed) continue;
            norm_row(job->x + r * job->count, row, job);
            store_pixels(row, &job->out, r, 1, 1, job->count);
        }
        free(row);
    }
    return failed;
}
