/* Integers held in floats, as calibration has them: requantization, rounded weights and GDN with their
 * gradients.
 *
 * Forward results equal the PyTorch forms of quant/fixedpoint.py, quant/rounding.py and
 * quant/integer_functions.py to the bit. Sums of gradients are taken in float64, in pieces of a fixed size
 * whatever the number of threads. `quant/fused.py` calls these functions.
 */

#include <stdlib.h>

#include "arithmetic.h"

enum { LANES = 16, PIECE = 4096 };

/* Grows with every change of what the functions here take or give. */
int calibration_version(void) {
    return 2;
}

/* ---------------------------------------------------------------------------------------- requantization */

#define TIE_FREE (1 + 0x1p-48)

/* Positive multipliers as mantissas of 22 bits, `multiplier_value(*quantize_multiplier(m))`, times a factor
 * for products of floats; see `_scale_and_round` of quant/fixedpoint.py. Returns 0 where one is zero,
 * negative or not finite. */
int fixed_multipliers(const double *m, double *out, int64_t count, int32_t tie_free) {
    for (int64_t i = 0; i < count; i++) {
        if (!(m[i] > 0) || !isfinite(m[i])) return 0;
        int exponent;
        const double mantissa = half_away(frexp(m[i], &exponent) * 0x1p22);
        /* a mantissa that is rounded up to 2^22 is held as 2^21 with a shift less: the value is the same */
        const int carried = mantissa >= 0x1p22;
        const int64_t power = larger(-1022, smaller(1023, exponent - 22 + carried));
        out[i] = mantissa * (carried ? 0.5 : 1.0) * power_of_two(power);
        if (tie_free) out[i] *= TIE_FREE;
    }
    return 1;
}

typedef struct {
    const void *x;                    /* float, or double where `wide` */
    void *out;                        /* float, or double where `wide` and there are no limits */
    int8_t *inside;                   /* twice the gradient of clipping, or null */
    const double *m;                  /* multipliers, any positive numbers */
    const float *low, *high, *factor; /* each null, or one number, or one for each channel */
    int64_t outer, channels, inner;   /* x is (outer, channels, inner) */
    int32_t m_alike, limits_alike, factor_alike, wide, threads;
} Requantize;

/* `count` neighbours, of one channel or of a channel each */
#define NARROW(M, LOW, HIGH, FACTOR, STORE)                                                                  \
    for (int64_t i = 0; i < count; i++) {                                                                    \
        float q = (float)rint((double)x[i] * (M));                                                           \
        STORE                                                                                                \
        const float l = LOW, h = HIGH;                                                                       \
        q = q < l ? l : q;                                                                                   \
        q = q > h ? h : q;                                                                                   \
        out[i] = (q + 0.0f) * (FACTOR);                                                                      \
    }
#define INSIDE(LOW, HIGH) inside[i] = (int8_t)((q > LOW) - (q < LOW) + (HIGH > q) - (HIGH < q));

CLONES static void narrow_row(const float *restrict x, float *restrict out, int8_t *restrict inside,
                              int64_t count, const double m, const float low, const float high,
                              const float factor) {
    if (inside)
        NARROW(m, low, high, factor, INSIDE(low, high))
    else
        NARROW(m, low, high, factor, )
}

CLONES static void narrow_channels(const float *restrict x, float *restrict out, int8_t *restrict inside,
                                   int64_t count, const double *restrict m, const float *restrict low,
                                   const float *restrict high, const float *restrict factor) {
    if (inside)
        NARROW(m[i], low[i], high[i], factor[i], INSIDE(low[i], high[i]))
    else
        NARROW(m[i], low[i], high[i], factor[i], )
}

CLONES static void narrow_unlimited(const float *restrict x, float *restrict out, int64_t count,
                                    const double *restrict m, int alike) {
    if (alike)
        for (int64_t i = 0; i < count; i++) out[i] = (float)rint((double)x[i] * m[0]) + 0.0f;
    else
        for (int64_t i = 0; i < count; i++) out[i] = (float)rint((double)x[i] * m[i]) + 0.0f;
}

static inline double wide_rounded(double p) {
    const double magnitude = floor(fabs(p) + BELOW_HALF);
    return (p < 0 ? -magnitude : magnitude) + 0.0;
}

/* channels are `step` entries apart: 0 or 1 */
CLONES static void wide_limited(const double *restrict x, float *restrict out, int8_t *restrict inside,
                                int64_t count, const double *restrict m, const float *restrict low,
                                const float *restrict high, const float *restrict factor, int64_t m_step,
                                int64_t step, int64_t factor_step) {
    for (int64_t i = 0; i < count; i++) {
        float q = (float)wide_rounded(x[i] * m[i * m_step]);
        const float l = low[i * step], h = high[i * step];
        if (inside) inside[i] = (int8_t)((q > l) - (q < l) + (h > q) - (h < q));
        q = q < l ? l : q;
        q = q > h ? h : q;
        out[i] = (q + 0.0f) * factor[i * factor_step];
    }
}

CLONES static void wide_unlimited(const double *restrict x, double *restrict out, int64_t count,
                                  const double *restrict m, int64_t m_step) {
    for (int64_t i = 0; i < count; i++) out[i] = wide_rounded(x[i] * m[i * m_step]);
}

static int64_t multipliers_of(const Requantize *job) {
    return job->m_alike ? 1 : job->channels;
}

static void requantize_run(const Requantize *job, int64_t start, int64_t channel, int64_t count) {
    const int64_t m_at = job->m_alike ? 0 : channel, at = job->limits_alike ? 0 : channel;
    const float one = 1.0f;
    const float *factor = job->factor ? job->factor + (job->factor_alike ? 0 : channel) : &one;
    const double *m = job->m + m_at;
    int8_t *inside = job->inside ? job->inside + start : 0;
    if (job->wide) {
        const double *x = (const double *)job->x + start;
        if (job->low)
            wide_limited(x, (float *)job->out + start, inside, count, m, job->low + at, job->high + at,
                         factor, 0, 0, 0);
        else
            wide_unlimited(x, (double *)job->out + start, count, m, 0);
        return;
    }
    const float *x = (const float *)job->x + start;
    float *out = (float *)job->out + start;
    if (job->low)
        narrow_row(x, out, inside, count, m[0], job->low[at], job->high[at], factor[0]);
    else
        narrow_unlimited(x, out, count, m, 1);
}

/* What each number of a piece has where channels lie side by side; a piece begins with channel `first`. */
typedef struct {
    double m[PIECE];
    float low[PIECE], high[PIECE], factor[PIECE];
} Each;

static void spread_out(const Requantize *job, int64_t first, int64_t channels, int64_t count, Each *each) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t c = first + i % channels;
        each->m[i] = job->m[job->m_alike ? 0 : c];
        each->low[i] = job->low ? job->low[job->limits_alike ? 0 : c] : 0;
        each->high[i] = job->low ? job->high[job->limits_alike ? 0 : c] : 0;
        each->factor[i] = job->factor ? job->factor[job->factor_alike ? 0 : c] : 1;
    }
}

static void requantize_each(const Requantize *job, int64_t start, int64_t count, const Each *each) {
    int8_t *inside = job->inside ? job->inside + start : 0;
    if (job->wide) {
        const double *x = (const double *)job->x + start;
        if (job->low)
            wide_limited(x, (float *)job->out + start, inside, count, each->m, each->low, each->high,
                         each->factor, 1, 1, 1);
        else
            wide_unlimited(x, (double *)job->out + start, count, each->m, 1);
        return;
    }
    const float *x = (const float *)job->x + start;
    float *out = (float *)job->out + start;
    if (job->low)
        narrow_channels(x, out, inside, count, each->m, each->low, each->high, each->factor);
    else
        narrow_unlimited(x, out, count, each->m, 0);
}

static void requantize_all(const Requantize *job) {
    const int alike = job->m_alike && (!job->low || job->limits_alike) && (!job->factor || job->factor_alike);
    if (job->inner == 1 && job->channels > 1 && !alike) {
        const int64_t n = job->channels, parts = (n + PIECE - 1) / PIECE;
        const int64_t together = parts > 1 ? 1 : PIECE / n; /* rows of a piece */
        const int64_t pieces = (job->outer + together - 1) / together;
#pragma omp parallel num_threads(job->threads)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t first = part * PIECE, count = smaller(PIECE, n - first);
            Each each;
            spread_out(job, first, n, parts > 1 ? count : together * n, &each);
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < pieces; piece++) {
                const int64_t row = piece * together;
                requantize_each(job, row * n + first,
                                parts > 1 ? count : smaller(together, job->outer - row) * n, &each);
            }
        }
        return;
    }
    const int64_t rows = alike ? 1 : job->outer * job->channels;
    const int64_t inner = alike ? job->outer * job->channels * job->inner : job->inner;
    const int64_t parts = (inner + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t piece = 0; piece < rows * parts; piece++) {
        const int64_t row = piece / parts, first = piece % parts * PIECE;
        requantize_run(job, row * inner + first, row % job->channels, smaller(PIECE, inner - first));
    }
}

/* Returns 1 where a multiplier is zero, negative or not finite, 2 where memory is lacking. */
int requantize_floats(const Requantize *given) {
    Requantize job = *given;
    const int64_t count = multipliers_of(given);
    double *fixed = malloc(sizeof(double) * count);
    if (!fixed) return 2;
    const int good = fixed_multipliers(given->m, fixed, count, !given->wide);
    job.m = fixed;
    if (good) requantize_all(&job);
    free(fixed);
    return !good;
}

typedef struct {
    const float *grad;
    const int8_t *inside; /* or null */
    const void *x;        /* or null: no sums are wanted */
    float *grad_x;        /* or null; double where `wide` and there are no limits, as `grad` then is */
    const double *m;      /* the multipliers */
    const float *factor;  /* or null */
    double *sums; /* of grad * x, one for each piece: (outer, parts, channels) or (outer, channels, parts) */
    int64_t outer, channels, inner;
    double half; /* 0.5 where there is `inside`, else 1 */
    int32_t m_alike, factor_alike, wide, threads;
} RequantizeGradient;

/* one run of a channel; returns the sum of grad * x */
#define RUN(TYPE)                                                                                            \
    double lanes[LANES] = {0};                                                                               \
    int64_t i = 0;                                                                                           \
    for (; i + LANES <= count; i += LANES)                                                                   \
        for (int l = 0; l < LANES; l++) {                                                                    \
            const float g = grad[i + l] * factor * (inside ? (float)inside[i + l] : 1.0f);                   \
            if (grad_x) grad_x[i + l] = g * m;                                                               \
            if (x) lanes[l] += (double)g * (double)((const TYPE *)x)[i + l];                                 \
        }                                                                                                    \
    for (; i < count; i++) {                                                                                 \
        const float g = grad[i] * factor * (inside ? (float)inside[i] : 1.0f);                               \
        if (grad_x) grad_x[i] = g * m;                                                                       \
        if (x) lanes[0] += (double)g * (double)((const TYPE *)x)[i];                                         \
    }                                                                                                        \
    double sum = 0;                                                                                          \
    for (int l = 0; l < LANES; l++) sum += lanes[l];                                                         \
    return sum;

CLONES static double gradient_full(const float *restrict grad, const int8_t *restrict inside,
                                   const float *restrict x, float *restrict grad_x, int64_t count, float m,
                                   float factor){RUN(float)}

CLONES static double gradient_any(const float *restrict grad, const int8_t *restrict inside,
                                  const float *restrict x, float *restrict grad_x, int64_t count, float m,
                                  float factor){RUN(float)}

CLONES static double gradient_wide(const float *restrict grad, const int8_t *restrict inside,
                                   const double *restrict x, float *restrict grad_x, int64_t count, float m,
                                   float factor){RUN(double)}

#define CHANNELS(NAME, TYPE)                                                                                 \
    CLONES static void NAME(const float *restrict grad, const int8_t *restrict inside,                       \
                            const TYPE *restrict x, float *restrict grad_x, int64_t count,                   \
                            const float *restrict m, int64_t m_step, const float *restrict factor,           \
                            int64_t factor_step, double *restrict sums) {                                    \
        for (int64_t i = 0; i < count; i++) {                                                                \
            const float g = grad[i] * factor[i * factor_step] * (inside ? (float)inside[i] : 1.0f);          \
            if (grad_x) grad_x[i] = g * m[i * m_step];                                                       \
            if (x) sums[i] += (double)g * (double)x[i];                                                      \
        }                                                                                                    \
    }

CHANNELS(gradient_channels, float) CHANNELS(gradient_wide_channels, double)

    /* Rows of channels that one entry of `sums` covers where channels lie side by side. */
    enum {
        ROWS = 256
    };

static void gradient_all(const RequantizeGradient *job, const float *m) {
    const float one = 1.0f;
    const float *factor = job->factor ? job->factor : &one;
    if (job->inner == 1 && job->channels > 1) {
        const int64_t n = job->channels, parts = (job->outer + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(job->threads) schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            double *sums = job->sums ? job->sums + part * n : 0;
            for (int64_t i = 0; sums && i < n; i++) sums[i] = 0;
            const int64_t factor_step = job->factor && !job->factor_alike;
            for (int64_t r = part * ROWS; r < smaller(job->outer, (part + 1) * ROWS); r++) {
                const float *grad = job->grad + r * n;
                const int8_t *inside = job->inside ? job->inside + r * n : 0;
                float *grad_x = job->grad_x ? job->grad_x + r * n : 0;
                if (job->wide)
                    gradient_wide_channels(grad, inside, job->x ? (const double *)job->x + r * n : 0, grad_x,
                                           n, m, !job->m_alike, factor, factor_step, sums);
                else
                    gradient_channels(grad, inside, job->x ? (const float *)job->x + r * n : 0, grad_x, n, m,
                                      !job->m_alike, factor, factor_step, sums);
            }
        }
        return;
    }
    const int64_t parts = (job->inner + PIECE - 1) / PIECE, rows = job->outer * job->channels;
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t piece = 0; piece < rows * parts; piece++) {
        const int64_t row = piece / parts, start = row * job->inner + piece % parts * PIECE,
                      count = smaller(PIECE, job->inner - piece % parts * PIECE),
                      channel = row % job->channels;
        const float by_m = m[job->m_alike ? 0 : channel],
                    by = factor[job->factor && !job->factor_alike ? channel : 0];
        const int8_t *inside = job->inside ? job->inside + start : 0;
        float *grad_x = job->grad_x ? job->grad_x + start : 0;
        double sum;
        if (job->wide)
            sum = gradient_wide(job->grad + start, inside, job->x ? (const double *)job->x + start : 0,
                                grad_x, count, by_m, by);
        else {
            const float *x = job->x ? (const float *)job->x + start : 0;
            sum = inside && x && grad_x ? gradient_full(job->grad + start, inside, x, grad_x, count, by_m, by)
                                        : gradient_any(job->grad + start, inside, x, grad_x, count, by_m, by);
        }
        if (job->sums) job->sums[piece] = sum;
    }
}

/* Returns 1 where memory is lacking. */
int requantize_gradient(const RequantizeGradient *job) {
    const int64_t count = job->m_alike ? 1 : job->channels;
    float *m = malloc(sizeof(float) * count);
    if (!m) return 1;
    for (int64_t i = 0; i < count; i++) m[i] = (float)(job->m[i] * job->half);
    gradient_all(job, m);
    free(m);
    return 0;
}

/* ------------------------------------------------------------------------------------- weights and ranges */

typedef struct {
    const float *w, *offset; /* (outputs, count); offset may be null */
    const double *scale;     /* (outputs,), or one */
    const uint8_t *mask;     /* 0 where a weight stays 0, or null */
    const float *grad;       /* for `weights_gradient` */
    float *out;              /* the integers; the offset's gradient */
    double *sums;            /* (outputs,): of the gradient times w / scale */
    int64_t outputs, count;
    float low, high;
    int32_t alike, threads;
} Weights;

#define SHARE ((float)((double)w[i] / scale) + (offset ? offset[i] : 0.0f))
#define ROUNDED(share) (floorf(fabsf(share) + 0.49999997f) * (share < 0 ? -1.0f : 1.0f) + 0.0f)

CLONES static void weights_row(const float *restrict w, const float *restrict offset,
                               const uint8_t *restrict mask, float *restrict out, int64_t count, double scale,
                               float low, float high) {
    for (int64_t i = 0; i < count; i++) {
        const float share = SHARE;
        float q = ROUNDED(share);
        if (mask) q = mask[i] ? q : 0.0f;
        q = q < low ? low : q;
        out[i] = q > high ? high : q;
    }
}

/* What lies on a limit takes no gradient, as in torch.clamp. */
CLONES static double weights_gradient_row(const float *restrict w, const float *restrict offset,
                                          const uint8_t *restrict mask, const float *restrict grad,
                                          float *restrict out, int64_t count, double scale, float low,
                                          float high) {
    double lanes[LANES] = {0};
    for (int64_t start = 0; start < count; start += LANES) {
        const int64_t stop = smaller(LANES, count - start);
        for (int64_t l = 0; l < stop; l++) {
            const int64_t i = start + l;
            const float ratio = (float)((double)w[i] / scale), share = ratio + (offset ? offset[i] : 0.0f);
            const float q = ROUNDED(share);
            const float g = q <= low || q >= high || (mask && !mask[i]) ? 0.0f : grad[i];
            out[i] = g;
            lanes[l] += (double)g * (double)ratio;
        }
    }
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

void weights_rounded(const Weights *job) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t o = 0; o < job->outputs; o++) {
        const int64_t at = o * job->count;
        weights_row(job->w + at, job->offset ? job->offset + at : 0, job->mask ? job->mask + at : 0,
                    job->out + at, job->count, job->scale[job->alike ? 0 : o], job->low, job->high);
    }
}

void weights_gradient(const Weights *job) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t o = 0; o < job->outputs; o++) {
        const int64_t at = o * job->count;
        job->sums[o] = weights_gradient_row(job->w + at, job->offset ? job->offset + at : 0,
                                            job->mask ? job->mask + at : 0, job->grad + at, job->out + at,
                                            job->count, job->scale[job->alike ? 0 : o], job->low, job->high);
    }
}

/* The largest over outputs of sum |w| * largest + |bias|. w is (outputs, inputs, taps); bias may be null. */
CLONES double largest_sum(const float *restrict w, const float *restrict largest, const double *restrict bias,
                          int64_t outputs, int64_t inputs, int64_t taps) {
    double most = 0;
    for (int64_t o = 0; o < outputs; o++) {
        double sum = bias ? fabs(bias[o]) : 0, lanes[LANES] = {0};
        for (int64_t k = 0; k < inputs; k++, w += taps) {
            double part = 0;
            if (taps == 1)
                lanes[k % LANES] += (double)(fabsf(w[0]) * largest[k]);
            else {
                for (int64_t t = 0; t < taps; t++) part += (double)fabsf(w[t]);
                sum += part * (double)largest[k];
            }
        }
        for (int l = 0; l < LANES; l++) sum += lanes[l];
        most = sum > most ? sum : most;
    }
    return most;
}

/* Smallest and largest number and sum of squares of each column of (rows, channels). */
CLONES static void ends_columns(const float *restrict x, int64_t rows, int64_t channels, float *restrict low,
                                float *restrict high, double *restrict squares) {
    for (int64_t c = 0; c < channels; c++) low[c] = high[c] = x[c], squares[c] = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < channels; c++) {
            const float v = x[r * channels + c];
            low[c] = v < low[c] ? v : low[c];
            high[c] = v > high[c] ? v : high[c];
            squares[c] += (double)v * (double)v;
        }
}

/* The same of one row. */
CLONES static void ends_row(const float *restrict x, int64_t count, float *restrict low, float *restrict high,
                            double *restrict squares) {
    enum { SIDE = 64 };
    float lows[SIDE], highs[SIDE];
    double sums[SIDE];
    const int64_t rows = count / SIDE;
    *low = *high = x[0], *squares = 0;
    if (rows) {
        ends_columns(x, rows, SIDE, lows, highs, sums);
        for (int i = 0; i < SIDE; i++) {
            *low = lows[i] < *low ? lows[i] : *low;
            *high = highs[i] > *high ? highs[i] : *high;
            *squares += sums[i];
        }
    }
    for (int64_t i = rows * SIDE; i < count; i++) {
        *low = x[i] < *low ? x[i] : *low;
        *high = x[i] > *high ? x[i] : *high;
        *squares += (double)x[i] * (double)x[i];
    }
}

/* Of each row of (rows, count). */
void row_ends(const float *x, float *low, float *high, double *squares, int64_t rows, int64_t count,
              int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) ends_row(x + r * count, count, low + r, high + r, squares + r);
}

/* Of the columns of (rows, channels); the results are (parts of ROWS rows, channels). */
void column_ends(const float *x, float *low, float *high, double *squares, int64_t rows, int64_t channels,
                 int32_t threads) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts; p++)
        ends_columns(x + p * ROWS * channels, smaller(ROWS, rows - p * ROWS), channels, low + p * channels,
                     high + p * channels, squares + p * channels);
}

CLONES static void energy_piece(const float *restrict x, float *restrict out, int64_t channels, int64_t step,
                                int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < count; i++) out[i] += x[c * step + i] * x[c * step + i];
}

/* x is (outer, channels, inner); the sums of squares are (outer, inner) */
void channel_energy(const float *x, float *out, int64_t outer, int64_t channels, int64_t inner,
                    int32_t threads) {
    const int64_t parts = (inner + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t piece = 0; piece < outer * parts; piece++) {
        const int64_t row = piece / parts, first = piece % parts * PIECE;
        energy_piece(x + row * channels * inner + first, out + row * inner + first, channels, inner,
                     smaller(PIECE, inner - first));
    }
}

/* ----------------------------------------------------------------------------------------------------- GDN
 */

typedef struct {
    const float *x;
    const double *norm;      /* a norm below 1 counts as 1 */
    const double *mantissa;  /* (channels,) */
    const int64_t *shift;    /* (channels,) */
    const float *low, *high; /* (channels,) */
    const double *slope;     /* (channels,), for the gradient: result = slope * x * norm^(-1/2, 1/2, -1, 1) */
    const float *grad;
    float *out; /* the result; the gradient of x */
    float *grad_norm;
    double *sums; /* (outer, channels): of the gradient times the real result */
    int64_t outer, channels, inner;
    int32_t inverse, with_root, threads;
} CalibrationGdn;

#define BITS(x, mask) from_bits(bits_of(x) & (mask))
static inline double from_bits(int64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

/* As `gdn4` of gdn.c has it, whose proof holds for |x| <= 2^15, limits up to 2^24 and shifts below 512. */
CLONES static void gdn_root_row(const float *restrict x, const double *restrict norm, float *restrict out,
                                int64_t count, double mantissa, int64_t shift, double low, double high,
                                int inverse) {
    const double two = power_of_two(inverse ? 11 - 25 - shift : -shift);
    if (inverse)
        for (int64_t i = 0; i < count; i++) {
            const double root = BITS(sqrt(norm[i] < 1 ? 1 : norm[i]), ~((1LL << 27) - 1));
            const double power = BITS(root, 0x7ffLL << 52);
            const double integer = from_bits((bits_of(root) & ((1LL << 52) - 1)) | bits_of(0x1p25));
            const double factor = floor(integer * mantissa * 0x1p-11 + BELOW_HALF);
            double p = ((double)x[i] * factor) * (power * two);
            p = p < low ? low : p;
            p = p > high ? high : p;
            const double q = floor(fabs(p) + BELOW_HALF);
            out[i] = (float)((p < 0 ? -q : q) + 0.0);
        }
    else
        for (int64_t i = 0; i < count; i++) {
            const double root = BITS(sqrt(norm[i] < 1 ? 1 : norm[i]), ~((1LL << 27) - 1));
            double p = ((double)x[i] * (mantissa * two)) / root;
            p = p < low ? low : p;
            p = p > high ? high : p;
            const double q = floor(fabs(p) + BELOW_HALF);
            out[i] = (float)((p < 0 ? -q : q) + 0.0);
        }
}

CLONES static void gdn_row(const float *restrict x, const double *restrict norm, float *restrict out,
                           int64_t count, double mantissa, int64_t shift, double low, double high,
                           int inverse, int with_root) {
    for (int64_t i = 0; i < count; i++) {
        const double q = gdn_number(x[i], norm[i], mantissa, shift, inverse, with_root);
        out[i] = (float)(clip((double)(float)q, low, high) + 0.0);
    }
}

/* fits: `gdn_root_row` has room for the numbers */
void gdn_floats(const CalibrationGdn *job, int32_t fits) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t row = 0; row < job->outer * job->channels; row++) {
        const int64_t c = row % job->channels, at = row * job->inner;
        if (fits)
            gdn_root_row(job->x + at, job->norm + at, job->out + at, job->inner, job->mantissa[c],
                         job->shift[c], job->low[c], job->high[c], job->inverse);
        else
            gdn_row(job->x + at, job->norm + at, job->out + at, job->inner, job->mantissa[c], job->shift[c],
                    job->low[c], job->high[c], job->inverse, job->with_root);
    }
}

/* The gradient of slope * x * norm^power; 0 for results at a limit, and to norms up to 1. */
CLONES static double gdn_gradient_row(const float *restrict x, const double *restrict norm,
                                      const float *restrict result, const float *restrict grad,
                                      float *restrict grad_x, float *restrict grad_norm, int64_t count,
                                      float slope, float low, float high, int inverse, int with_root) {
    const float power = (with_root ? 0.5f : 1.0f) * (inverse ? 1.0f : -1.0f);
    double lanes[LANES] = {0};
    for (int64_t start = 0; start < count; start += LANES) {
        const int64_t stop = smaller(LANES, count - start);
        for (int64_t l = 0; l < stop; l++) {
            const int64_t i = start + l;
            const float q = result[i];
            const float inside = q <= low || q >= high ? 0.0f : 1.0f;
            const float n = norm[i] < 1 ? 1.0f : (float)norm[i];
            const float root = with_root ? sqrtf(n) : n;
            const float by = inverse ? slope * root : slope / root;
            const float g = grad[i] * inside, part = g * (x[i] * by);
            grad_x[i] = g * by;
            grad_norm[i] = norm[i] <= 1 ? 0.0f : part * power / n;
            lanes[l] += (double)part;
        }
    }
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

void gdn_gradient(const CalibrationGdn *job, const float *result) {
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (int64_t row = 0; row < job->outer * job->channels; row++) {
        const int64_t c = row % job->channels, at = row * job->inner;
        job->sums[row] = gdn_gradient_row(
            job->x + at, job->norm + at, result + at, job->grad + at, job->out + at, job->grad_norm + at,
            job->inner, (float)job->slope[c], job->low[c], job->high[c], job->inverse, job->with_root);
    }
}
