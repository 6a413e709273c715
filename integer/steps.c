/* Elementwise steps on a tile's numbers while they are in the cache. */

#include "arithmetic.h"

#if X86
/* Parameters of channels; with m_alike the multiplier, with alike the limits are those of the first for all.
 * Returns how many numbers are done: fewer than 4 or 8 are left. */
AVX2 static int rescale_avx2(int32_t *out, const int32_t *x, int count, const double *m, int m_alike,
                             const int32_t *low, const int32_t *high, int alike) {
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

AVX2 static int rescale_tie_free_avx2(int32_t *out, const int32_t *x, int count, const double *m, int m_alike,
                                      const int32_t *low, const int32_t *high, int alike) {
    int i = 0;
    const __m256d m0 = _mm256_set1_pd(m[0]);
    const __m256i l0 = _mm256_set1_epi32(low[0]), h0 = _mm256_set1_epi32(high[0]);
    if (m_alike)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_si256((__m256i *)(out + i),
                                rescale8(_mm256_loadu_si256((const __m256i *)(x + i)), m0, m0, l0, h0));
    else
        for (; i + 8 <= count; i += 8) {
            const __m256i l = alike ? l0 : _mm256_loadu_si256((const __m256i *)(low + i));
            const __m256i h = alike ? h0 : _mm256_loadu_si256((const __m256i *)(high + i));
            const __m256i number = _mm256_loadu_si256((const __m256i *)(x + i));
            _mm256_storeu_si256((__m256i *)(out + i),
                                rescale8(number, _mm256_loadu_pd(m + i), _mm256_loadu_pd(m + i + 4), l, h));
        }
    return i;
}

/* x, or where it is negative x times a tie-free multiplier between 0 and 1 */
AVX2 static int leaky_tie_free_avx2(int32_t *out, const int32_t *x, int count, double multiplier) {
    int i = 0;
    const __m256d m = _mm256_set1_pd(multiplier);
    for (; i + 8 <= count; i += 8) {
        const __m256i number = _mm256_loadu_si256((const __m256i *)(x + i));
        _mm256_storeu_si256((__m256i *)(out + i),
                            rescale8(number, m, m, number, _mm256_set1_epi32(INT32_MAX)));
    }
    return i;
}
#endif

CLONES static void rescale(int32_t *out, const int32_t *x, int n, const Step *s) {
    const double *m = s->rescale.multiplier;
    const int32_t *low = s->rescale.low, *high = s->rescale.high, *factor = s->rescale.factor;
    const int one = s->period == 1, period = one ? n : s->period;
    for (int start = 0; start < n; start += period) {
        const int count = n - start < period ? n - start : period;
        const int32_t *from = x + start;
        int32_t *to = out + start;
        int i = 0;
#if X86
        if (HAS_AVX2) {
            const int alike = s->rescale.limits_alike;
            i = s->rescale.tie_free ? rescale_tie_free_avx2(to, from, count, m, one, low, high, alike)
                                    : rescale_avx2(to, from, count, m, one, low, high, alike);
        }
#endif
        if (one)
            for (; i < count; i++) to[i] = rounded(clip(from[i] * m[0], low[0], high[0]));
        else
            for (; i < count; i++) to[i] = rounded(clip(from[i] * m[i], low[i], high[i]));
        if (factor)
            for (i = 0; i < count; i++) to[i] *= factor[one ? 0 : i];
    }
}

CLONES static void simple(const Step *s, int32_t *restrict out, const int32_t *restrict a,
                          const int32_t *restrict b, int n) {
    const int period = s->period;
    switch (s->op) {
    case ADD: {
        const int32_t low = s->add.low[0], high = s->add.high[0];
        for (int i = 0; i < n; i++) {
            const int32_t v = a[i] + b[i];
            out[i] = v < low ? low : v > high ? high : v;
        }
        break;
    }
    case ADD_CHANNELS: {
        const int32_t low = s->add.low[0], high = s->add.high[0];
        for (int start = 0; start < n; start += period) {
            const int count = n - start < period ? n - start : period;
            for (int i = 0; i < count; i++) {
                const int32_t v = a[start + i] + s->add.addend[i];
                out[start + i] = v < low ? low : v > high ? high : v;
            }
        }
        break;
    }
    case MULTIPLY:
        for (int i = 0; i < n; i++) out[i] = a[i] * b[i];
        break;
    case NEG:
        for (int i = 0; i < n; i++) out[i] = -a[i];
        break;
    case ABS:
        for (int i = 0; i < n; i++) out[i] = a[i] < 0 ? -a[i] : a[i];
        break;
    case SQUARE:
        for (int i = 0; i < n; i++) out[i] = a[i] * a[i];
        break;
    case CLAMP:
        if (period == 1) {
            const int32_t low = s->clamp.low[0], high = s->clamp.high[0];
            for (int i = 0; i < n; i++) out[i] = a[i] < low ? low : a[i] > high ? high : a[i];
        } else
            for (int start = 0; start < n; start += period) {
                const int count = n - start < period ? n - start : period;
                const int32_t *low = s->clamp.low, *high = s->clamp.high;
                for (int i = 0; i < count; i++) {
                    const int32_t v = a[start + i];
                    out[start + i] = v < low[i] ? low[i] : v > high[i] ? high[i] : v;
                }
            }
        break;
    case LEAKY: {
        const double m = s->leaky.multiplier[0];
        int i = 0;
#if X86
        if (s->leaky.tie_free && HAS_AVX2) i = leaky_tie_free_avx2(out, a, n, m);
#endif
        for (; i < n; i++) {
            const int32_t r = rounded(a[i] * m);
            out[i] = a[i] < 0 ? r : a[i];
        }
        break;
    }
    case TABLE:
        for (int i = 0; i < n; i++) {
            const int32_t entry = a[i] - s->table.first;
            out[i] = s->table.entries[entry < 0 ? 0 : entry > s->table.last ? s->table.last : entry];
        }
        break;
    }
}

#define LOAD_AS(type)                                                                                        \
    {                                                                                                        \
        const type *x = (const type *)array->data + start;                                                   \
        for (int c = 0; c < count; c++) to[c] = x[c] - offset;                                               \
        break;                                                                                               \
    }
#define STORE_AS(type)                                                                                       \
    {                                                                                                        \
        type *to = (type *)array->data + start;                                                              \
        for (int c = 0; c < count; c++) to[c] = (type)(from[c] + offset);                                    \
        break;                                                                                               \
    }

CLONES static void load(int32_t *restrict out, const Array *array, int64_t pixel, int64_t step, int pixels,
                        int channels) {
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

CLONES void store_pixels(const int32_t *restrict x, const Array *array, int64_t pixel, int64_t step,
                         int pixels, int channels) {
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
static void store_shuffled(const int32_t *x, const Array *array, int64_t pixel, int pixels, int channels,
                           int side, int columns) {
    const int run = channels / side; /* of a row of the square */
    for (int p = 0; p < pixels; p++)
        for (int a = 0; a < side; a++) {
            const int64_t row = (pixel + p) / columns * side + a;
            store_pixels(x + (int64_t)p * channels + a * run, array, row * columns + (pixel + p) % columns, 1,
                         1, run);
        }
}

static void steps_on_piece(const Step *steps, int count, const Array *arrays, int32_t *first,
                           int32_t *registers, int64_t size, int64_t pixel, int64_t step, int pixels,
                           int channels) {
    const int n = pixels * channels;
    for (const Step *s = steps; s < steps + count; s++) {
        int32_t *out = s->dst ? registers + (s->dst - 1) * size : first;
        const int32_t *a = s->a ? registers + (s->a - 1) * size : first,
                      *b = s->b ? registers + (s->b - 1) * size : first;
        switch (s->op) {
        case LOAD: load(out, &arrays[s->b], pixel, step, pixels, channels); break;
        case STORE:
            if (s->store.shuffle_side)
                store_shuffled(a, &arrays[s->b], pixel, pixels, channels, s->store.shuffle_side,
                               s->store.row_pixels);
            else
                store_pixels(a, &arrays[s->b], pixel, step, pixels, channels);
            break;
        case RESCALE: rescale(out, a, n, s); break;
        case GDN: gdn(out, a, b, n, s); break;
        default: simple(s, out, a, b, n);
        }
    }
}

void steps_on_tile(const Step *steps, int count, const Array *arrays, int32_t *first, int32_t *registers,
                   int64_t size, int64_t pixel, int64_t step, int pixels, int channels) {
    int piece = channels < PIECE_NUMBERS ? PIECE_NUMBERS / channels : 1;
    if (piece > 8) piece -= piece % 8; /* whole vectors */
    for (int done = 0; done < pixels; done += piece)
        steps_on_piece(steps, count, arrays, first + (int64_t)done * channels, registers, size,
                       pixel + done * step, step, pixels - done < piece ? pixels - done : piece, channels);
}
