/* Integer kernels for the CPU: products into int32 accumulators, and what happens to a tile of accumulators while it is in the
 * cache. Every result equals `integer/reference.py` to the bit on every machine: sums of products are int32 arithmetic without
 * saturation, whose ranges the program proves, and the floating-point steps are single exact or correctly rounded IEEE operations
 * (compiled without contraction and without reassociation).
 *
 * Plain C called through ctypes; no Python header is needed to build it.
 */

#include "kernels.h"


static const int SIZE[] = {1, 1, 2, 4};

/* ---------------------------------------------------------------------------------- elementwise steps on a tile's numbers */

#define BELOW_HALF 0.49999999999999994

static inline double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

/* round_half_away of a double; what does not fit int32 must have been clipped before */
static inline int32_t rounded(double p) { return (int32_t)(p + copysign(BELOW_HALF, p)); }

#if X86
/* round_half_away(x * m) clipped, four numbers */
AVX2 static inline __m128i rescale4(__m128i x, __m256d m, __m256d low, __m256d high) {
    __m256d p = _mm256_mul_pd(_mm256_cvtepi32_pd(x), m);
    p = _mm256_min_pd(_mm256_max_pd(p, low), high);
    const __m256d half = _mm256_or_pd(_mm256_and_pd(p, _mm256_set1_pd(-0.0)), _mm256_set1_pd(BELOW_HALF));
    return _mm256_cvttpd_epi32(_mm256_add_pd(p, half));
}

/* the same of eight numbers, where the multiplier is nudged: the processor's rounding of ties meets none */
AVX2 static inline __m256i rescale8(__m256i x, __m256d m0, __m256d m1, __m256i low, __m256i high) {
    const __m128i first = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)), m0));
    const __m128i second = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1)), m1));
    return _mm256_min_epi32(_mm256_max_epi32(_mm256_set_m128i(second, first), low), high);
}

/* Parameters of channels, or with m_alike and alike the same for all. These give how many numbers they did: the rest is less than 4 or 8. */
AVX2 static int rescale_avx2(int32_t *out, const int32_t *x, int count, const double *m, int m_alike, const int32_t *low,
                             const int32_t *high, int alike) {
    int i = 0;
    const __m256d m0 = _mm256_set1_pd(m[0]), l0 = _mm256_set1_pd(low[0]), h0 = _mm256_set1_pd(high[0]);
    for (; i + 4 <= count; i += 4) {
        const __m256d l = alike ? l0 : _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(low + i)));
        const __m256d h = alike ? h0 : _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(high + i)));
        const __m128i number = _mm_loadu_si128((const __m128i *)(x + i));
        _mm_storeu_si128((__m128i *)(out + i), rescale4(number, m_alike ? m0 : _mm256_loadu_pd(m + i), l, h));
    }
    return i;
}

AVX2 static int rescale_nudged_avx2(int32_t *out, const int32_t *x, int count, const double *m, int m_alike, const int32_t *low,
                                    const int32_t *high, int alike) {
    int i = 0;
    const __m256d m0 = _mm256_set1_pd(m[0]);
    const __m256i l0 = _mm256_set1_epi32(low[0]), h0 = _mm256_set1_epi32(high[0]);
    if (m_alike)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_si256((__m256i *)(out + i), rescale8(_mm256_loadu_si256((const __m256i *)(x + i)), m0, m0, l0, h0));
    else
        for (; i + 8 <= count; i += 8) {
            const __m256i l = alike ? l0 : _mm256_loadu_si256((const __m256i *)(low + i));
            const __m256i h = alike ? h0 : _mm256_loadu_si256((const __m256i *)(high + i));
            const __m256i number = _mm256_loadu_si256((const __m256i *)(x + i));
            _mm256_storeu_si256((__m256i *)(out + i), rescale8(number, _mm256_loadu_pd(m + i), _mm256_loadu_pd(m + i + 4), l, h));
        }
    return i;
}

/* x, or where it is negative x times a nudged multiplier between 0 and 1 */
AVX2 static int leaky_nudged_avx2(int32_t *out, const int32_t *x, int count, double multiplier) {
    int i = 0;
    const __m256d m = _mm256_set1_pd(multiplier);
    for (; i + 8 <= count; i += 8) {
        const __m256i number = _mm256_loadu_si256((const __m256i *)(x + i));
        _mm256_storeu_si256((__m256i *)(out + i), rescale8(number, m, m, number, _mm256_set1_epi32(INT32_MAX)));
    }
    return i;
}
#endif

/* s->first: the limits are the same for all channels */
CLONES static void rescale(int32_t *out, const int32_t *x, int n, const Step *s) {
    const double *m = s->multiplier;
    const int32_t *low = s->low, *high = s->high, *factor = s->factor;
    const int one = s->period == 1, period = one ? n : s->period;
    for (int start = 0; start < n; start += period) {
        const int count = n - start < period ? n - start : period;
        const int32_t *from = x + start;
        int32_t *to = out + start;
        int i = 0;
#if X86
        if (__builtin_cpu_supports("avx2"))
            i = s->quick ? rescale_nudged_avx2(to, from, count, m, one, low, high, s->first) : rescale_avx2(to, from, count, m, one, low, high, s->first);
#endif
        if (one) for (; i < count; i++) to[i] = rounded(clip(from[i] * m[0], low[0], high[0]));
        else for (; i < count; i++) to[i] = rounded(clip(from[i] * m[i], low[i], high[i]));
        if (factor) for (i = 0; i < count; i++) to[i] *= factor[one ? 0 : i];
    }
}

/* floor(sqrt(n)) of a whole number below 2^52 */
static inline double whole_root(double n) {
    double root = floor(sqrt(n));
    root -= root * root > n ? 1.0 : 0.0;
    root += (root + 1) * (root + 1) <= n ? 1.0 : 0.0;
    return root;
}

static inline int64_t bits_of(double x) { int64_t bits; memcpy(&bits, &x, 8); return bits; }
static inline double power_of_two(int64_t exponent) { int64_t bits = (exponent + 1023) << 52; double x; memcpy(&x, &bits, 8); return x; }
/* bits of a whole number > 0 */
static inline int64_t length_of(double x) { return (bits_of(x) >> 52) - 1022; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline double half_away(double x) { return copysign(floor(fabs(x) + BELOW_HALF), x); }

/* `quant.integer_functions._gdn_piece`, one number */
static inline double gdn_number(double x, double norm, double mantissa, int64_t shift, int inverse, int with_root) {
    int64_t k;
    double divisor;
    norm = norm < 1 ? 1 : norm;
    if (with_root) {
        k = (52 - length_of(norm)) >> 1;
        divisor = whole_root(norm * power_of_two(2 * k));
    } else {
        k = 26 - length_of(norm);
        divisor = half_away(norm * power_of_two(k));
    }
    if (inverse) {
        const double factor = half_away(divisor * mantissa * power_of_two(-11));
        return half_away(x * factor * power_of_two(larger(-1022, smaller(1023, 11 - k - shift))));
    }
    const double dividend = fabs(x) * mantissa;
    const int64_t exponent = k - shift;
    const int64_t length = dividend > 0 ? length_of(dividend) : 0;
    const double a = dividend * power_of_two(smaller(larger(exponent, 0), 52 - length));
    const double b = divisor * power_of_two(smaller(larger(-exponent, 0), 25));
    double quotient = floor(a / b + 0.5);
    const double twice_rest = (a - quotient * b) * 2;
    quotient += twice_rest >= b ? 1.0 : 0.0;
    quotient -= twice_rest < -b ? 1.0 : 0.0;
    return copysign(quotient, x);
}

#if X86
AVX2 static inline __m256d masked4(__m256d x, int64_t bits) { return _mm256_and_pd(x, _mm256_castsi256_pd(_mm256_set1_epi64x(bits))); }

/* `gdn_number` with a root, four numbers; mantissa, shift, low, high of their channels.
 *
 * A norm is shifted to 51 or 52 bits before its root is cut to a whole number: that leaves the root's 26 highest bits, so its other
 * mantissa bits are cleared. The square root and the quotient are rounded correctly, and neither rounding reaches or crosses a whole
 * number or a half that the exact value does not: the root of n < 2^52 is at least 2^-27 below the next whole number, and a / b with
 * a < 2^52 at least 1 / (2 b) > a / b 2^-53 from the next half. Where the reference limits its powers of two, results are clipped or 0.
 */
AVX2 static inline __m128i gdn4(__m128i x, __m128i norms, __m256d mantissa, __m256i shift, __m256d low, __m256d high, int inverse) {
    const __m256d sign = _mm256_set1_pd(-0.0), below_half = _mm256_set1_pd(BELOW_HALF);
    const __m256d number = _mm256_cvtepi32_pd(x);
    const __m256d norm = _mm256_cvtepi32_pd(_mm_max_epi32(norms, _mm_set1_epi32(1)));
    const __m256d root = masked4(_mm256_sqrt_pd(norm), ~((1LL << 27) - 1)); /* times 2^-k */
    const __m256i bias = _mm256_set1_epi64x(1023);
    __m256d result;
    if (inverse) {
        const __m256d power = masked4(root, 0x7ffLL << 52); /* 2^(25 - k) */
        const __m256d whole = _mm256_or_pd(masked4(root, (1LL << 52) - 1), _mm256_set1_pd(0x1p25));
        const __m256d factor = _mm256_floor_pd(_mm256_add_pd(_mm256_mul_pd(_mm256_mul_pd(whole, mantissa), _mm256_set1_pd(0x1p-11)), below_half));
        const __m256i exponent = _mm256_sub_epi64(_mm256_set1_epi64x(11 - 25), shift);
        const __m256d two = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(exponent, bias), 52));
        result = _mm256_mul_pd(_mm256_mul_pd(number, factor), _mm256_mul_pd(power, two));
    } else {
        const __m256d two = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_sub_epi64(bias, shift), 52));
        result = _mm256_div_pd(_mm256_mul_pd(number, _mm256_mul_pd(mantissa, two)), root);
    }
    result = _mm256_min_pd(_mm256_max_pd(result, low), high);
    return _mm256_cvttpd_epi32(_mm256_add_pd(result, _mm256_or_pd(_mm256_and_pd(result, sign), below_half)));
}

/* `gdn_number` with a root, eight numbers, where float32 settles it; else `settled` is 0 somewhere and `gdn4` must say.
 *
 * `scale` is mantissa * 2^-shift, exact in float32. In units of 2^-24, the relative errors are: of the norm as a float32, halved by the root,
 * 0.5; of the processor's 1/sqrt, at most 1.5 * 2^-12, after Newton's step 1.5 * 1.5^2 < 3.4; of that step's roundings 0.5 for the square,
 * which counts half, 0.5 for the product near 1/2, 1 for the difference near 1, 1 for the result; 1 for each of the two products after
 * it; and the reference's own cut of the root to 26 bits moves 0.5. Together 9.4, of which `margin` is 10. The inverse has a product more and cuts
 * its factor, which for mantissas of 10 bits or more moves less than 0.5: 10.9, margin 11. So where a number with its margin around it lies
 * between two halves, the reference rounds to the same; and where it was clipped to a limit below 2^16, the reference's is beyond the limit
 * or less than 1/2 inside.
 */
AVX2 static inline __m256i gdn8(__m256i x, __m256i norms, __m256 scale, __m256i low, __m256i high, int inverse, int *settled) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX)), margin = _mm256_set1_ps(inverse ? 11 * 0x1p-24f : 10 * 0x1p-24f);
    const __m256 norm = _mm256_cvtepi32_ps(_mm256_max_epi32(norms, _mm256_set1_epi32(1)));
    const __m256 guess = _mm256_rsqrt_ps(norm);
    const __m256 half = _mm256_mul_ps(_mm256_mul_ps(guess, guess), _mm256_mul_ps(norm, _mm256_set1_ps(0.5f)));
    __m256 root = _mm256_mul_ps(guess, _mm256_sub_ps(_mm256_set1_ps(1.5f), half)); /* its inverse */
    if (inverse) root = _mm256_mul_ps(root, norm);
    __m256 p = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(x), scale), root);
    p = _mm256_min_ps(_mm256_max_ps(p, _mm256_cvtepi32_ps(low)), _mm256_cvtepi32_ps(high));
    const __m256i nearest = _mm256_cvtps_epi32(p);
    const __m256 rest = _mm256_and_ps(_mm256_sub_ps(p, _mm256_cvtepi32_ps(nearest)), magnitude);
    const __m256 reach = _mm256_add_ps(rest, _mm256_mul_ps(_mm256_and_ps(p, magnitude), margin));
    *settled = _mm256_movemask_ps(_mm256_cmp_ps(reach, _mm256_set1_ps(0.4999f), _CMP_LT_OQ)) == 0xff;
    return nearest;
}

AVX2 static void gdn_avx2(int32_t *restrict out, const int32_t *restrict x, const int32_t *restrict norm, int n, const Step *s) {
    for (int start = 0; start < n; start += s->period) {
        const int count = n - start < s->period ? n - start : s->period;
        int i = 0;
        while (i + 4 <= count) {
            const int eight = i + 8 <= count;
            if (s->scale && eight) {
                int settled;
                const __m256i q = gdn8(_mm256_loadu_si256((const __m256i *)(x + start + i)), _mm256_loadu_si256((const __m256i *)(norm + start + i)),
                                       _mm256_loadu_ps(s->scale + i), _mm256_loadu_si256((const __m256i *)(s->low + i)),
                                       _mm256_loadu_si256((const __m256i *)(s->high + i)), s->first, &settled);
                if (settled) {
                    _mm256_storeu_si256((__m256i *)(out + start + i), q);
                    i += 8;
                    continue;
                }
            }
            for (const int end = i + (eight ? 8 : 4); i < end; i += 4) {
                const __m256i shift = _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)(s->table + i)));
                const __m256d low = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(s->low + i)));
                const __m256d high = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(s->high + i)));
                const __m128i q = gdn4(_mm_loadu_si128((const __m128i *)(x + start + i)), _mm_loadu_si128((const __m128i *)(norm + start + i)),
                                       _mm256_loadu_pd(s->multiplier + i), shift, low, high, s->first);
                _mm_storeu_si128((__m128i *)(out + start + i), q);
            }
        }
        for (; i < count; i++) {
            const double q = gdn_number(x[start + i], norm[start + i], s->multiplier[i], s->table[i], s->first, s->last);
            out[start + i] = (int32_t)clip(q, s->low[i], s->high[i]);
        }
    }
}
#endif

CLONES static void gdn(int32_t *restrict out, const int32_t *restrict x, const int32_t *restrict norm, int n, const Step *s) {
    for (int start = 0; start < n; start += s->period) {
        const int count = n - start < s->period ? n - start : s->period;
        for (int i = 0; i < count; i++) {
            const double q = gdn_number(x[start + i], norm[start + i], s->multiplier[i], s->table[i], s->first, s->last);
            out[start + i] = (int32_t)clip(q, s->low[i], s->high[i]);
        }
    }
}

CLONES static void simple(const Step *s, int32_t *restrict out, const int32_t *restrict a, const int32_t *restrict b, int n) {
    const int period = s->period;
    switch (s->op) {
    case ADD: {
        const int32_t low = s->low[0], high = s->high[0];
        for (int i = 0; i < n; i++) { const int32_t v = a[i] + b[i]; out[i] = v < low ? low : v > high ? high : v; }
        break;
    }
    case ADDC: {
        const int32_t low = s->low[0], high = s->high[0];
        for (int start = 0; start < n; start += period) {
            const int count = n - start < period ? n - start : period;
            for (int i = 0; i < count; i++) {
                const int32_t v = a[start + i] + s->table[i];
                out[start + i] = v < low ? low : v > high ? high : v;
            }
        }
        break;
    }
    case PRODUCT: for (int i = 0; i < n; i++) out[i] = a[i] * b[i]; break;
    case NEG: for (int i = 0; i < n; i++) out[i] = -a[i]; break;
    case ABS: for (int i = 0; i < n; i++) out[i] = a[i] < 0 ? -a[i] : a[i]; break;
    case SQUARE: for (int i = 0; i < n; i++) out[i] = a[i] * a[i]; break;
    case CLAMP:
        if (period == 1) {
            const int32_t low = s->low[0], high = s->high[0];
            for (int i = 0; i < n; i++) out[i] = a[i] < low ? low : a[i] > high ? high : a[i];
        } else for (int start = 0; start < n; start += period) {
            const int count = n - start < period ? n - start : period;
            const int32_t *low = s->low, *high = s->high;
            for (int i = 0; i < count; i++) {
                const int32_t v = a[start + i];
                out[start + i] = v < low[i] ? low[i] : v > high[i] ? high[i] : v;
            }
        }
        break;
    case LEAKY: {
        const double m = s->multiplier[0];
        int i = 0;
#if X86
        if (s->quick && __builtin_cpu_supports("avx2")) i = leaky_nudged_avx2(out, a, n, m);
#endif
        for (; i < n; i++) { const int32_t r = rounded(a[i] * m); out[i] = a[i] < 0 ? r : a[i]; }
        break;
    }
    case TABLE:
        for (int i = 0; i < n; i++) {
            int32_t place = a[i] - s->first;
            place = place < 0 ? 0 : place > s->last ? s->last : place;
            out[i] = s->table[place];
        }
        break;
    }
}

#define LOAD_AS(type) { const type *x = (const type *)array->data + start; for (int c = 0; c < count; c++) to[c] = x[c] - offset; break; }
#define STORE_AS(type) { type *to = (type *)array->data + start; for (int c = 0; c < count; c++) to[c] = (type)(from[c] + offset); break; }

CLONES static void load(int32_t *restrict out, const Array *array, int64_t pixel, int64_t step, int pixels, int channels) {
    const int runs = step == 1 ? 1 : pixels, count = step == 1 ? pixels * channels : channels;
    const int32_t offset = array->offset;
    for (int p = 0; p < runs; p++, pixel += step) {
        const int64_t start = pixel * channels;
        int32_t *to = out + (int64_t)p * channels;
        switch (array->type) {
        case S8: LOAD_AS(int8_t)
        case U8: LOAD_AS(uint8_t)
        case S16: LOAD_AS(int16_t)
        case S32: LOAD_AS(int32_t)
        }
    }
}

CLONES static void store(const int32_t *restrict x, const Array *array, int64_t pixel, int64_t step, int pixels, int channels) {
    const int runs = step == 1 ? 1 : pixels, count = step == 1 ? pixels * channels : channels;
    const int32_t offset = array->offset;
    for (int p = 0; p < runs; p++, pixel += step) {
        const int64_t start = pixel * channels;
        const int32_t *from = x + (int64_t)p * channels;
        switch (array->type) {
        case S8: STORE_AS(int8_t)
        case U8: STORE_AS(uint8_t)
        case S16: STORE_AS(int16_t)
        case S32: STORE_AS(int32_t)
        }
    }
}

/* A pixel shuffle: the channels of a pixel are those of side * side pixels, row by row. */
static void store_shuffled(const int32_t *x, const Array *array, int64_t pixel, int pixels, int channels, int side, int columns) {
    const int run = channels / side; /* of a row of the square */
    for (int p = 0; p < pixels; p++)
        for (int a = 0; a < side; a++) {
            const int64_t row = (pixel + p) / columns * side + a;
            store(x + (int64_t)p * channels + a * run, array, row * columns + (pixel + p) % columns, 1, 1, run);
        }
}

static void steps_on_piece(const Step *steps, int count, const Array *arrays, int32_t *first, int32_t *registers, int64_t size, int64_t pixel,
                           int64_t step, int pixels, int channels) {
    const int n = pixels * channels;
    for (const Step *s = steps; s < steps + count; s++) {
        int32_t *out = s->dst ? registers + (s->dst - 1) * size : first;
        const int32_t *a = s->a ? registers + (s->a - 1) * size : first, *b = s->b ? registers + (s->b - 1) * size : first;
        switch (s->op) {
        case LOAD: load(out, &arrays[s->b], pixel, step, pixels, channels); break;
        case STORE:
            if (s->first) store_shuffled(a, &arrays[s->b], pixel, pixels, channels, s->first, s->last);
            else store(a, &arrays[s->b], pixel, step, pixels, channels);
            break;
        case RESCALE: rescale(out, a, n, s); break;
        case GDN:
#if X86
            if (s->quick && __builtin_cpu_supports("avx2")) { gdn_avx2(out, a, b, n, s); break; }
#endif
            gdn(out, a, b, n, s);
            break;
        default: simple(s, out, a, b, n);
        }
    }
}

void steps_on_tile(const Step *steps, int count, const Array *arrays, int32_t *first, int32_t *registers, int64_t size, int64_t pixel,
                   int64_t step, int pixels, int channels) {
    int piece = channels < PIECE_NUMBERS ? PIECE_NUMBERS / channels : 1;
    if (piece > 8) piece -= piece % 8; /* whole vectors */
    for (int done = 0; done < pixels; done += piece)
        steps_on_piece(steps, count, arrays, first + (int64_t)done * channels, registers, size, pixel + done * step, step,
                       pixels - done < piece ? pixels - done : piece, channels);
}

/* -------------------------------------------------------------------------------------------------------- products */

typedef struct {
    const char *x;         /* (batch, height, width, inputs) */
    const char *weights;   /* see `pack` in integer/layers.py */
    const int32_t *bias;   /* of whole blocks of outputs, corrections for offsets of x included */
    const char *border;    /* what stands outside the image: `inputs` numbers */
    const int32_t *taps;   /* (count, 2): row and column that a tap reads, from (row * stride, column * stride) on */
    int32_t type;          /* of x: U8 or S16 */
    int32_t batch, height, width, inputs;
    int32_t count;         /* of taps */
    int32_t rows, columns; /* of outputs, before they are spread */
    int32_t stride_rows, stride_columns;
    int32_t outputs;
    int32_t spread, first_row, first_column; /* output (i, j) stands at row i * spread + first_row ... */
    int32_t all_columns, all_rows;           /* of the spread output */
    int32_t threads;
} Product;

/* acc[p][0..15] = bias + sum over taps and inputs; x[tap * GROUP + p]: where pixel p's inputs of a tap begin. A row of acc may be shorter
 * than 16: pixels are written in their order. */
typedef void Micro(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias, int32_t *acc, int64_t row);

static void micro_s16(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias, int32_t *acc, int64_t row) {
    const int16_t *w = (const int16_t *)weights;
    int32_t sums[GROUP][BLOCK];
    for (int p = 0; p < GROUP; p++) memcpy(sums[p], bias, sizeof sums[p]);
    for (int tap = 0; tap < taps; tap++, x += GROUP)
        for (int i = 0; i < inputs; i += 2, w += 2 * BLOCK)
            for (int p = 0; p < GROUP; p++) {
                const int16_t *from = (const int16_t *)x[p] + i;
                const int32_t first = from[0], second = from[1];
                for (int o = 0; o < BLOCK; o++) sums[p][o] += first * w[2 * o] + second * w[2 * o + 1];
            }
    for (int p = 0; p < GROUP; p++) memcpy(acc + p * row, sums[p], sizeof sums[p]);
}

static void micro_u8(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias, int32_t *acc, int64_t row) {
    const int8_t *w = (const int8_t *)weights;
    int32_t sums[GROUP][BLOCK];
    for (int p = 0; p < GROUP; p++) memcpy(sums[p], bias, sizeof sums[p]);
    for (int tap = 0; tap < taps; tap++, x += GROUP)
        for (int i = 0; i < inputs; i += 4, w += 4 * BLOCK)
            for (int p = 0; p < GROUP; p++) {
                const uint8_t *from = (const uint8_t *)x[p] + i;
                for (int o = 0; o < BLOCK; o++)
                    for (int j = 0; j < 4; j++) sums[p][o] += (int32_t)from[j] * w[4 * o + j];
            }
    for (int p = 0; p < GROUP; p++) memcpy(acc + p * row, sums[p], sizeof sums[p]);
}

#if X86
__attribute__((target("avx2"))) static void micro_s16_avx2(const char *const *x, int taps, int inputs, const char *weights,
                                                           const int32_t *bias, int32_t *acc, int64_t row) {
    __m256i sums[GROUP][2];
    for (int p = 0; p < GROUP; p++)
        for (int h = 0; h < 2; h++) sums[p][h] = _mm256_loadu_si256((const __m256i *)bias + h);
    for (int tap = 0; tap < taps; tap++, x += GROUP) {
        const char *from[GROUP];
        for (int p = 0; p < GROUP; p++) from[p] = x[p];
        for (int i = 0; i < inputs; i += 2, weights += 4 * BLOCK) {
            const __m256i w0 = _mm256_loadu_si256((const __m256i *)weights), w1 = _mm256_loadu_si256((const __m256i *)weights + 1);
#pragma GCC unroll 6
            for (int p = 0; p < GROUP; p++) {
                const __m256i pair = _mm256_set1_epi32(four_bytes(from[p] + 2 * i));
                sums[p][0] = _mm256_add_epi32(sums[p][0], _mm256_madd_epi16(pair, w0));
                sums[p][1] = _mm256_add_epi32(sums[p][1], _mm256_madd_epi16(pair, w1));
            }
        }
    }
    for (int p = 0; p < GROUP; p++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i *)(acc + p * row) + h, sums[p][h]);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) static void micro_s16_avx512(const char *const *x, int taps, int inputs,
                                                                                 const char *weights, const int32_t *bias, int32_t *acc,
                                                                                 int64_t row) {
    __m512i sums[GROUP];
    for (int p = 0; p < GROUP; p++) sums[p] = _mm512_loadu_si512(bias);
    for (int tap = 0; tap < taps; tap++, x += GROUP)
        for (int i = 0; i < inputs; i += 2, weights += 4 * BLOCK) {
            const __m512i w = _mm512_loadu_si512(weights);
#pragma GCC unroll 6
            for (int p = 0; p < GROUP; p++)
                sums[p] = _mm512_add_epi32(sums[p], _mm512_madd_epi16(_mm512_set1_epi32(four_bytes(x[p] + 2 * i)), w));
        }
    for (int p = 0; p < GROUP; p++) _mm512_storeu_si512(acc + p * row, sums[p]);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static void micro_u8_vnni(const char *const *x, int taps, int inputs,
                                                                                         const char *weights, const int32_t *bias,
                                                                                         int32_t *acc, int64_t row) {
    __m512i sums[GROUP];
    for (int p = 0; p < GROUP; p++) sums[p] = _mm512_loadu_si512(bias);
    for (int tap = 0; tap < taps; tap++, x += GROUP)
        for (int i = 0; i < inputs; i += 4, weights += 4 * BLOCK) {
            const __m512i w = _mm512_loadu_si512(weights);
#pragma GCC unroll 6
            for (int p = 0; p < GROUP; p++) sums[p] = _mm512_dpbusd_epi32(sums[p], _mm512_set1_epi32(four_bytes(x[p] + i)), w);
        }
    for (int p = 0; p < GROUP; p++) _mm512_storeu_si512(acc + p * row, sums[p]);
}
#endif

/* whether 8-bit products run on 8-bit instructions here: then inputs are best stored as U8, else as S16 */
int has_vnni(void) {
#if X86
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

static Micro *micro_for(int type) {
#if X86
    if (type == U8 && has_vnni()) return micro_u8_vnni;
    if (type == S16 && __builtin_cpu_supports("avx512bw")) return micro_s16_avx512;
    if (type == S16 && __builtin_cpu_supports("avx2")) return micro_s16_avx2;
#endif
    return type == U8 ? micro_u8 : micro_s16;
}

/* The products of a layer, each tile followed by `steps`, whose register 0 holds the accumulators. Gives 1 where memory ran out. */
int products(const Product *job, const Step *steps, int step_count, const Array *arrays, int register_count) {
    Micro *micro = micro_for(job->type);
    const int outputs = job->outputs, blocks = (outputs + BLOCK - 1) / BLOCK;
    int tile = TILE_NUMBERS / (blocks * BLOCK) / GROUP * GROUP;
    if (tile < GROUP) tile = GROUP;
    if (tile > job->columns + GROUP - 1) tile = (job->columns + GROUP - 1) / GROUP * GROUP;
    const int size = SIZE[job->type], pack = 4 / size;
    const int groups = (job->inputs + pack - 1) / pack;
    const int64_t block_bytes = (int64_t)job->count * groups * 4 * BLOCK;
    const int64_t lines = (int64_t)job->batch * job->rows;
    const int64_t register_size = (int64_t)tile * outputs + BLOCK;
    int failed = 0;
#pragma omp parallel num_threads(job->threads)
    {
        int32_t *registers = malloc(sizeof(int32_t) * register_size * register_count);
        const char **places = malloc(sizeof(char *) * job->count * tile);
        if (!registers || !places) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t line = 0; line < lines; line++) {
            if (failed) continue;
            const int64_t image = line / job->rows;
            const int i = (int)(line % job->rows);
            for (int j = 0; j < job->columns; j += tile) {
                const int pixels = job->columns - j < tile ? job->columns - j : tile;
                const int padded = (pixels + GROUP - 1) / GROUP * GROUP;
                for (int g = 0; g < padded; g += GROUP)
                    for (int tap = 0; tap < job->count; tap++)
                        for (int p = 0; p < GROUP; p++) {
                            const int place = g + p < pixels ? g + p : pixels - 1;
                            const int y = i * job->stride_rows + job->taps[2 * tap];
                            const int x = (j + place) * job->stride_columns + job->taps[2 * tap + 1];
                            const int inside = y >= 0 && y < job->height && x >= 0 && x < job->width;
                            places[(g / GROUP * job->count + tap) * GROUP + p] =
                                inside ? job->x + ((image * job->height + y) * job->width + x) * job->inputs * size : job->border;
                        }
                /* last to first: what the last block of a pixel writes beyond it, the first of the next pixel writes over */
                for (int block = blocks - 1; block >= 0; block--)
                    for (int g = 0; g < padded; g += GROUP)
                        micro(places + (int64_t)g * job->count, job->count, job->inputs, job->weights + block * block_bytes,
                              job->bias + block * BLOCK, registers + (int64_t)g * outputs + block * BLOCK, outputs);
                const int64_t pixel = (image * job->all_rows + (int64_t)i * job->spread + job->first_row) * job->all_columns +
                                      (int64_t)j * job->spread + job->first_column;
                steps_on_tile(steps, step_count, arrays, registers, registers + register_size, register_size, pixel, job->spread, pixels, outputs);
            }
        }
        free(registers);
        free(places);
    }
    return failed;
}

/* Steps on arrays alone, (pixels, channels). */
int elementwise(int64_t pixels, int channels, const Step *steps, int step_count, const Array *arrays, int register_count, int threads) {
    int tile = TILE_NUMBERS / channels;
    if (tile < 1) tile = 1;
    const int64_t register_size = (int64_t)tile * channels, tiles = (pixels + tile - 1) / tile;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        int32_t *registers = malloc(sizeof(int32_t) * register_size * register_count);
        if (!registers) failed = 1;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            if (failed) continue;
            const int count = (int)(pixels - t * tile < tile ? pixels - t * tile : tile);
            steps_on_tile(steps, step_count, arrays, registers, registers + register_size, register_size, t * tile, 1, count, channels);
        }
        free(registers);
    }
    return failed;
}

/* ---------------------------------------------------------------------------------------------------------- layer norm */

typedef struct {
    const int16_t *x;          /* (rows, count) */
    const double *eps;         /* C^2 eps_q shifted by 2k, for k = 0..26 */
    const double *multiplier;  /* (count,), magnitude of the gain */
    const double *sign, *offset, *low, *high;
    int64_t rows;
    double eps_ceiling;        /* ceil(C^2 eps_q) */
    int32_t count, threads;
    Array out;
} LayerNorm;

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
    const double factor = power_of_two(k + 12) / whole_root(variance) * LAYER_NORM_NUDGE;
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
            store(row, &job->out, r, 1, 1, job->count);
        }
        free(row);
    }
    return failed;
}

/* ----------------------------------------------------------------------------------------------------------- attention */

typedef struct {
    const int16_t *q, *k, *v;     /* (batch, heads, queries, inner), (batch, heads, keys, inner), (batch, heads, keys, width) */
    const double *score_scale;    /* (heads,), to steps of 1/256 nat */
    const double *weight_scale;   /* (heads,), from probabilities to what multiplies v */
    const int32_t *offset;        /* (kinds, heads, queries, keys) or null */
    const uint8_t *blank;         /* (kinds, heads, queries): rows without a key; or null */
    const int32_t *kind;          /* (batch,), or null: kind 0 */
    const float *table;           /* 2^12 exp(-i / 256) */
    int64_t batch;
    int64_t q_steps[3], k_steps[3], v_steps[3]; /* of batch, head and row, in numbers */
    int32_t heads, queries, keys, inner, width, last, score_low, score_high, weight_low, weight_high, threads;
    int32_t quick;                /* both scales are nudged */
    Array out;                    /* (batch, heads, queries, width) */
} Attention;

enum { QUERIES = 16 };

/* out[t][0..n) = sum over pairs of a[t][pair] b[pair][0..n), both held as pairs of int16; n a multiple of 8 */
CLONES static void pair_products(const int16_t *restrict a, const int16_t *restrict b, int32_t *restrict out, int rows, int pairs, int n) {
    for (int t = 0; t < rows; t++) {
        int32_t *to = out + (int64_t)t * n;
        memset(to, 0, sizeof(int32_t) * n);
        for (int p = 0; p < pairs; p++) {
            const int32_t first = a[(int64_t)t * 2 * pairs + 2 * p], second = a[(int64_t)t * 2 * pairs + 2 * p + 1];
            const int16_t *from = b + (int64_t)p * 2 * n;
            for (int i = 0; i < n; i++) to[i] += first * from[2 * i] + second * from[2 * i + 1];
        }
    }
}

#if X86
/* `halves` times 8 columns of four rows */
AVX2 static inline void pair_tile(const int16_t *const *from, const int16_t *b, int32_t *const *to, int pairs, int n, const int halves) {
    __m256i sums[4][2];
    for (int r = 0; r < 4; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int p = 0; p < pairs; p++, b += 2 * n) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i *)b), w1 = halves > 1 ? _mm256_loadu_si256((const __m256i *)b + 1) : w0;
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i pair = _mm256_set1_epi32(four_bytes((const char *)(from[r] + 2 * p)));
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pair, w0));
            if (halves > 1) sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pair, w1));
        }
    }
    for (int r = 3; r >= 0; r--) /* backwards: rows that are not there repeat the first */
        for (int h = 0; h < halves; h++) _mm256_storeu_si256((__m256i *)to[r] + h, sums[r][h]);
}

AVX2 static void pair_products_avx2(const int16_t *restrict a, const int16_t *restrict b, int32_t *restrict out, int rows, int pairs, int n) {
    for (int t = 0; t < rows; t += 4) {
        const int16_t *from[4];
        for (int r = 0; r < 4; r++) from[r] = a + (int64_t)(t + r < rows ? t + r : t) * 2 * pairs;
        for (int i = 0; i < n; i += 16) {
            int32_t *to[4];
            for (int r = 0; r < 4; r++) to[r] = out + (int64_t)(t + r < rows ? t + r : t) * n + i;
            if (i + 16 <= n) pair_tile(from, b + 2 * i, to, pairs, n, 2);
            else pair_tile(from, b + 2 * i, to, pairs, n, 1);
        }
    }
}
#endif

static void multiply_pairs(const int16_t *a, const int16_t *b, int32_t *out, int rows, int pairs, int n) {
#if X86
    if (__builtin_cpu_supports("avx2")) { pair_products_avx2(a, b, out, rows, pairs, n); return; }
#endif
    pair_products(a, b, out, rows, pairs, n);
}

/* from weights to probabilities in 2^-15, of which `total` is one */
static float softmax_factor(double total) {
    total = total < 1 ? 1 : total;
    const int64_t k = length_of(total) + 11;
    const double a = power_of_two(k);
    double quotient = floor(a / total + 0.5);
    const double rest = (a - quotient * total) * 2;
    quotient += rest >= total ? 1.0 : 0.0;
    quotient -= rest < -total ? 1.0 : 0.0;
    return (float)quotient * (float)power_of_two(16 - k);
}

/* `quant.integer_functions.fixed_softmax` of one row, times a scale, as int16 */
CLONES static void softmax_row(int32_t *restrict score, const int32_t *restrict offset, int keys, const float *table, int last, double scale,
                               int low, int high, int16_t *restrict out, float *restrict weight) {
    int32_t top = INT32_MIN;
    if (offset) for (int i = 0; i < keys; i++) score[i] += offset[i];
    for (int i = 0; i < keys; i++) top = score[i] > top ? score[i] : top;
    for (int i = 0; i < keys; i++) { const int32_t below = top - score[i]; score[i] = below > last ? last : below; }
    for (int i = 0; i < keys; i++) weight[i] = table[score[i]];
    double total = 0;
    if (keys <= 4096) {
        int32_t whole = 0;
        for (int i = 0; i < keys; i++) whole += (int32_t)weight[i];
        total = whole;
    } else for (int i = 0; i < keys; i++) total += weight[i];
    const float factor = softmax_factor(total);
    for (int i = 0; i < keys; i++) {
        const float p = floorf(weight[i] * factor + 0.49999997f);
        out[i] = (int16_t)rounded(clip(p * scale, low, high));
    }
}

#if X86
/* The same of a row of sums of products of queries and keys, with nudged scales, for up to 4096 keys. Whole vectors of 8 are read and written. */
AVX2 static void softmax_row_avx2(int32_t *score, const int32_t *offset, int head, const Attention *job, int16_t *out, float *weight) {
    const int keys = job->keys, tail = keys % 8;
    const __m256d score_scale = _mm256_set1_pd(job->score_scale[head]), weight_scale = _mm256_set1_pd(job->weight_scale[head]);
    const __m256i score_low = _mm256_set1_epi32(job->score_low), score_high = _mm256_set1_epi32(job->score_high);
    const __m256i weight_low = _mm256_set1_epi32(job->weight_low), weight_high = _mm256_set1_epi32(job->weight_high);
    const __m256i last = _mm256_set1_epi32(job->last), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i all = _mm256_set1_epi32(-1), some = tail ? _mm256_cmpgt_epi32(_mm256_set1_epi32(tail), lanes) : all;
    __m256i most = _mm256_set1_epi32(INT32_MIN), sum = _mm256_setzero_si256();
    for (int i = 0; i < keys; i += 8) {
        const __m256i there = i + 8 <= keys ? all : some;
        __m256i s = rescale8(_mm256_loadu_si256((const __m256i *)(score + i)), score_scale, score_scale, score_low, score_high);
        if (offset) s = _mm256_add_epi32(s, i + 8 <= keys ? _mm256_loadu_si256((const __m256i *)(offset + i)) : _mm256_maskload_epi32(offset + i, some));
        s = _mm256_blendv_epi8(_mm256_set1_epi32(-(1 << 30)), s, there);
        _mm256_storeu_si256((__m256i *)(score + i), s);
        most = _mm256_max_epi32(most, s);
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    const __m256i top = _mm256_broadcastd_epi32(half);
    for (int i = 0; i < keys; i += 8) {
        const __m256i below = _mm256_min_epi32(_mm256_sub_epi32(top, _mm256_loadu_si256((const __m256i *)(score + i))), last);
        __m256 w = _mm256_i32gather_ps(job->table, below, 4);
        w = _mm256_and_ps(w, _mm256_castsi256_ps(i + 8 <= keys ? all : some));
        _mm256_storeu_ps(weight + i, w);
        sum = _mm256_add_epi32(sum, _mm256_cvttps_epi32(w));
    }
    half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    const __m256 factor = _mm256_set1_ps(softmax_factor(_mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)))));
    for (int i = 0; i < keys; i += 8) {
        const __m256 p = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(weight + i), factor), _mm256_set1_ps(0.49999997f));
        const __m256i q = rescale8(_mm256_cvttps_epi32(p), weight_scale, weight_scale, weight_low, weight_high);
        _mm_storeu_si128((__m128i *)(out + i), _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
    }
}
#endif

/* pairs of inner numbers: (inner pairs, keys8, 2) */
CLONES static void pack_keys(const int16_t *restrict k, int64_t step, int keys, int inner, int16_t *restrict packed, int keys8) {
    if (inner % 2 == 0)
        for (int p = 0; p < inner / 2; p++)
            for (int i = 0; i < keys; i++) memcpy(packed + ((int64_t)p * keys8 + i) * 2, k + i * step + 2 * p, 4);
    else
        for (int i = 0; i < keys; i++)
            for (int c = 0; c < inner; c++) packed[((int64_t)(c / 2) * keys8 + i) * 2 + c % 2] = k[i * step + c];
}

/* pairs of keys: (pairs of keys, width8, 2) */
CLONES static void pack_values(const int16_t *restrict v, int64_t step, int keys, int width, int16_t *restrict packed, int width8) {
    for (int i = 0; i + 1 < keys; i += 2) {
        int16_t *restrict to = packed + (int64_t)i * width8;
        const int16_t *restrict first = v + i * step, *restrict second = first + step;
        for (int c = 0; c < width; c++) { to[2 * c] = first[c]; to[2 * c + 1] = second[c]; }
    }
    if (keys % 2)
        for (int c = 0; c < width; c++) packed[(int64_t)(keys - 1) * width8 + 2 * c] = v[(keys - 1) * step + c];
}

int attention(const Attention *job) {
    const int keys = job->keys, inner = job->inner, width = job->width;
    const int keys8 = (keys + 7) / 8 * 8, width8 = (width + 7) / 8 * 8, inner2 = (inner + 1) / 2, keys2 = (keys + 1) / 2;
    const int64_t lines = job->batch * job->heads;
    int failed = 0;
#pragma omp parallel num_threads(job->threads)
    {
        int16_t *packed_k = calloc((size_t)inner2 * 2 * keys8, 2), *packed_v = calloc((size_t)keys2 * 2 * width8, 2);
        int16_t *rows = calloc((size_t)QUERIES * 2 * inner2, 2), *weights = calloc((size_t)QUERIES * 2 * keys2 + 8, 2);
        int32_t *scores = malloc(sizeof(int32_t) * QUERIES * keys8), *results = malloc(sizeof(int32_t) * QUERIES * width8);
        float *row = malloc(sizeof(float) * keys8);
        if (!packed_k || !packed_v || !rows || !weights || !scores || !results || !row) failed = 1;
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            if (failed) continue;
            const int head = (int)(line % job->heads);
            const int64_t kind = job->kind ? job->kind[line / job->heads] : 0;
            const int64_t image = line / job->heads;
            pack_keys(job->k + image * job->k_steps[0] + head * job->k_steps[1], job->k_steps[2], keys, inner, packed_k, keys8);
            pack_values(job->v + image * job->v_steps[0] + head * job->v_steps[1], job->v_steps[2], keys, width, packed_v, width8);
            const int16_t *q = job->q + image * job->q_steps[0] + head * job->q_steps[1];
            const double score_scale = job->score_scale[head], weight_scale = job->weight_scale[head];
            for (int t = 0; t < job->queries; t += QUERIES) {
                const int many = job->queries - t < QUERIES ? job->queries - t : QUERIES;
                for (int r = 0; r < many; r++)
                    memcpy(rows + (int64_t)r * 2 * inner2, q + (t + r) * job->q_steps[2], sizeof(int16_t) * inner);
                multiply_pairs(rows, packed_k, scores, many, inner2, keys8);
                for (int r = 0; r < many; r++) {
                    int32_t *score = scores + (int64_t)r * keys8;
                    const int64_t place = (kind * job->heads + head) * job->queries + t + r;
                    const int32_t *offset = job->offset ? job->offset + place * keys : 0;
                    int16_t *weight = weights + (int64_t)r * 2 * keys2;
                    if (job->blank && job->blank[place]) { memset(weight, 0, sizeof(int16_t) * keys); continue; }
#if X86
                    if (job->quick && keys <= 4096 && __builtin_cpu_supports("avx2")) {
                        softmax_row_avx2(score, offset, head, job, weight, row); /* may write into the next row, which comes next */
                        continue;
                    }
#endif
                    for (int i = 0; i < keys; i++) score[i] = rounded(clip(score[i] * score_scale, job->score_low, job->score_high));
                    softmax_row(score, offset, keys, job->table, job->last, weight_scale, job->weight_low, job->weight_high, weight, row);
                }
                multiply_pairs(weights, packed_v, results, many, keys2, width8);
                for (int r = 0; r < many; r++) store(results + (int64_t)r * width8, &job->out, line * job->queries + t + r, 1, 1, width);
            }
        }
        free(packed_k); free(packed_v); free(rows); free(weights); free(scores); free(results); free(row);
    }
    return failed;
}
