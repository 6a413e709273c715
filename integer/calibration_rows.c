/* Rows of calibration: softmax and layer normalization on integers held in floats, with their gradients, and
 * the compensated rounding of a block of weights.
 *
 * Forward results equal `fixed_softmax` and `integer_layer_norm` of quant/integer_functions.py to the bit.
 * `quant/fused_rows.py` calls these functions.
 */

#include <stdlib.h>

#include "arithmetic.h"

enum { LANES = 16 };

#define NORM_TIE_FREE (1 + 0x1p-46)

/* ------------------------------------------------------------------------------------------------- softmax
 */

typedef struct {
    const float *q;                         /* (batch, tiles, rows, keys) */
    const float *offset;                    /* (kinds, rows, keys), or null */
    const int64_t *kind;                    /* (tiles,); null: tile t has offset 0 */
    const float *table;                     /* exponentials by the distance from the largest score */
    const float *grad;                      /* for `softmax_gradient` */
    float *out;                             /* the probabilities; the gradient of q */
    int64_t batch, tiles, rows, keys, last; /* last: of the table's entries */
    float unit;                             /* of the gradient */
    int32_t threads;
} SoftmaxFloats;

/* the table's index of each key */
CLONES static void distances(const float *restrict q, const float *restrict offset, float *restrict score,
                             int32_t *restrict index, int64_t count, float last) {
    float lanes[LANES], top;
    for (int l = 0; l < LANES; l++) lanes[l] = -INFINITY;
    if (offset)
        for (int64_t i = 0; i < count; i++) score[i] = q[i] + offset[i];
    else
        for (int64_t i = 0; i < count; i++) score[i] = q[i];
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = score[i + l] > lanes[l] ? score[i + l] : lanes[l];
    for (; i < count; i++) lanes[0] = score[i] > lanes[0] ? score[i] : lanes[0];
    top = lanes[0];
    for (int l = 1; l < LANES; l++) top = lanes[l] > top ? lanes[l] : top;
    for (i = 0; i < count; i++) {
        const float distance = top - score[i];
        index[i] = (int32_t)(distance < last ? distance : last);
    }
}

CLONES static double weights_of(const float *restrict table, const int32_t *restrict index,
                                float *restrict weight, int64_t count) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i < count; i++) weight[i] = table[index[i]];
    for (i = 0; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)weight[i + l];
    for (; i < count; i++) lanes[0] += (double)weight[i];
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

CLONES static void shares_of(const float *restrict weight, float *restrict out, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) out[i] = floorf(weight[i] * factor + 0.49999997f);
}

/* Sums of integers below 2^24 are exact in float64 in any order. */
static void softmax_row(const SoftmaxFloats *job, int64_t at, const float *offset, float *score,
                        int32_t *index) {
    const int64_t keys = job->keys;
    distances(job->q + at, offset, score, index, keys, (float)job->last);
    double total = weights_of(job->table, index, score, keys);
    total = total < 1 ? 1 : total;
    const int64_t k = length_of(total) + 11;
    const double power = power_of_two(k);
    double quotient = floor(power / total + 0.5);
    const double twice_rest = (power - quotient * total) * 2;
    quotient += (twice_rest >= total) - (twice_rest < -total);
    shares_of(score, job->out + at, keys, (float)quotient * (float)power_of_two(16 - k));
}

CLONES static double weighted_sum(const float *restrict weight, const float *restrict grad, int64_t count) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)(weight[i + l] * grad[i + l]);
    for (; i < count; i++) lanes[0] += (double)(weight[i] * grad[i]);
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

CLONES static void gradient_of(const float *restrict weight, const float *restrict grad, float *restrict out,
                               int64_t count, float mean, float factor) {
    for (int64_t i = 0; i < count; i++) out[i] = weight[i] * factor * (grad[i] - mean);
}

/* Here the table holds real exponentials. */
static void softmax_gradient_row(const SoftmaxFloats *job, int64_t at, const float *offset, float *score,
                                 int32_t *index) {
    const int64_t keys = job->keys;
    distances(job->q + at, offset, score, index, keys, (float)job->last);
    const double total = weights_of(job->table, index, score, keys);
    const double mean = weighted_sum(score, job->grad + at, keys) / total;
    gradient_of(score, job->grad + at, job->out + at, keys, (float)mean, (float)(job->unit / total));
}

/* Returns 1 where memory is lacking. */
int softmax_rows(const SoftmaxFloats *job, int32_t gradient) {
    int failed = 0;
    const int64_t rows = job->rows, keys = job->keys;
#pragma omp parallel num_threads(job->threads)
    {
        float *score = malloc((sizeof(float) + sizeof(int32_t)) * keys);
        int32_t *index = (int32_t *)(score + keys);
        if (!score) failed = 1;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < job->batch * job->tiles * rows; row++) {
            if (failed) continue;
            const int64_t kind = job->kind ? job->kind[row / rows % job->tiles] : 0;
            const float *offset = job->offset ? job->offset + (kind * rows + row % rows) * keys : 0;
            (gradient ? softmax_gradient_row : softmax_row)(job, row * keys, offset, score, index);
        }
        free(score);
    }
    return failed;
}

/* --------------------------------------------------------------------------------------------- layer norm */

typedef struct {
    const float *x;           /* (rows, count) */
    const double *eps;        /* `layer_norm_constants` */
    const double *multiplier; /* (count,), positive, of `fixed_multipliers` with tie_free */
    const float *sign;        /* (count,) */
    const float *offset;      /* (count,) */
    const float *low, *high;  /* (count,) */
    const float *gain;        /* (count,), for the gradient: sign * multiplier in units of real results */
    const float *grad;
    const int8_t *inside; /* of a gradient: what `layer_norm_rows` has put there */
    float *out;           /* the numbers; the gradient of x */
    int8_t *clipped;      /* twice the gradient of the clipping, or null */
    int64_t rows, count;
    double eps_ceiling, eps_real; /* count^2 eps rounded up; eps */
    int32_t threads;
} LayerNormFloats;

CLONES static void norm_row(const LayerNormFloats *job, const float *restrict x, float *restrict out,
                            int8_t *restrict clipped) {
    const int64_t n = job->count;
    double sums[LANES] = {0}, powers[LANES] = {0}, total = 0, squares = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            const double v = (double)x[i + l];
            sums[l] += v;
            powers[l] += v * v;
        }
    for (; i < n; i++) sums[0] += (double)x[i], powers[0] += (double)x[i] * (double)x[i];
    for (int l = 0; l < LANES; l++) total += sums[l], squares += powers[l];
    const double spread = squares * (double)n - total * total, ceiling = spread + job->eps_ceiling;
    const int64_t k = (52 - (ceiling > 0 ? length_of(ceiling) : 0)) / 2;
    const double variance = clip(spread * power_of_two(2 * k) + job->eps[k], 1, 0x1p52 - 1);
    const double factor = power_of_two(k + 12) / integer_root(variance) * NORM_TIE_FREE;
    const double *restrict m = job->multiplier;
    const float *restrict sign = job->sign, *restrict offset = job->offset, *restrict low = job->low,
                          *restrict high = job->high;
    for (i = 0; i < n; i++) {
        const float normalized = (float)rint(((double)x[i] * (double)n - total) * factor);
        float q = ((float)rint((double)normalized * m[i]) + 0.0f) * sign[i] + offset[i];
        if (clipped) clipped[i] = (int8_t)((q > low[i]) - (q < low[i]) + (high[i] > q) - (high[i] < q));
        q = q < low[i] ? low[i] : q;
        out[i] = q > high[i] ? high[i] : q;
    }
}

void layer_norm_rows(const LayerNormFloats *job) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t at = row * job->count;
        norm_row(job, job->x + at, job->out + at, job->clipped ? job->clipped + at : 0);
    }
}

/* The gradient of gain * (x - mean) / sqrt(variance + eps). */
CLONES static void norm_gradient_row(const LayerNormFloats *job, const float *restrict x,
                                     const float *restrict grad, const int8_t *restrict inside,
                                     float *restrict out) {
    const int64_t n = job->count;
    const float *restrict gain = job->gain;
    double sums[LANES] = {0}, powers[LANES] = {0}, grads[LANES] = {0}, products[LANES] = {0};
    double total = 0, squares = 0, of_grad = 0, of_product = 0;
    int64_t i = 0;
#define ADD_TO(LANE)                                                                                         \
    const float g = grad[i + LANE] * gain[i + LANE] * (0.5f * (float)inside[i + LANE]);                      \
    const double v = (double)x[i + LANE];                                                                    \
    out[i + LANE] = g;                                                                                       \
    sums[LANE] += v, powers[LANE] += v * v, grads[LANE] += (double)g, products[LANE] += (double)g * v;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            ADD_TO(l)
        }
    for (; i < n; i++) {
        ADD_TO(0)
    }
    for (int l = 0; l < LANES; l++)
        total += sums[l], squares += powers[l], of_grad += grads[l], of_product += products[l];
    const double mean = total / (double)n, variance = squares / (double)n - mean * mean + job->eps_real;
    const double by = 1 / sqrt(variance), mean_grad = of_grad / (double)n;
    const double slope = (of_product / (double)n - mean_grad * mean) * by * by;
    for (i = 0; i < n; i++)
        out[i] = (float)(((double)out[i] - mean_grad - ((double)x[i] - mean) * slope) * by);
}

void layer_norm_gradient(const LayerNormFloats *job) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t at = row * job->count;
        norm_gradient_row(job, job->x + at, job->grad + at, job->inside + at, job->out + at);
    }
}

/* ---------------------------------------------------------------------------------- compensated rounding */

typedef struct {
    float *target;        /* (columns, outputs): what the rounding of each column aims at; changed */
    const float *work;    /* (columns, outputs): the real weights */
    const float *within;  /* (columns, columns): what an error in column j adds to the aim of column k */
    const uint8_t *mask;  /* (columns, outputs), 0 where a weight stays 0; or null */
    float *w_int, *error; /* (columns, outputs) */
    int64_t columns, outputs;
    float low, high;
    int32_t threads;
} Compensation;

enum { OUTPUTS = 64 };

CLONES static void compensate_some(const Compensation *job, int64_t first, int64_t count) {
    for (int64_t j = 0; j < job->columns; j++) {
        const int64_t at = j * job->outputs + first;
        const float *restrict aim = job->target + at, *restrict work = job->work + at;
        float *restrict w_int = job->w_int + at, *restrict error = job->error + at;
        for (int64_t o = 0; o < count; o++) {
            const float q = floorf(fabsf(aim[o]) + 0.49999997f) * (aim[o] < 0 ? -1.0f : 1.0f) + 0.0f;
            w_int[o] = q < job->low ? job->low : q > job->high ? job->high : q;
        }
        if (job->mask)
            for (int64_t o = 0; o < count; o++) w_int[o] = job->mask[at + o] ? w_int[o] : 0.0f;
        for (int64_t o = 0; o < count; o++) error[o] = work[o] - w_int[o];
        for (int64_t k = j + 1; k < job->columns; k++) {
            float *restrict later = job->target + k * job->outputs + first;
            const float share = job->within[j * job->columns + k];
            for (int64_t o = 0; o < count; o++) later[o] += share * error[o];
        }
    }
}

void compensated_block(const Compensation *job) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t part = 0; part < (job->outputs + OUTPUTS - 1) / OUTPUTS; part++)
        compensate_some(job, part * OUTPUTS, smaller(OUTPUTS, job->outputs - part * OUTPUTS));
}
