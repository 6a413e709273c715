/* Elementwise steps on the numbers of a tile: what happens to accumulators while they are in the cache.
 *
 * Of this and the other kernels: every result equals `integer/reference.py` to the bit on every machine: sums
 * of products are int32 arithmetic without saturation, whose ranges the program proves, and the
 * floating-point steps are single exact or correctly rounded IEEE operations (compiled without contraction
 * and without reassociation).
 *
 * Plain C called through ctypes; no Python header is needed to build it.
 */

#include "numbers.h"

#if X86

/* Parameters of channels, or with m_alike and alike the same for all. These give how many numbers they did:
 * the rest is less than 4 or 8. */
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
            i = s->rescale.tie_free
                    ? rescale_tie_free_avx2(to, from, count, m, one, low, high, s->rescale.same_limits)
                    : rescale_avx2(to, from, count, m, one, low, high, s->rescale.same_limits);
#endif
        if (one)
            for (; i < count; i++) to[i] = rounded(clip(from[i] * m[0], low[0], high[0]));
        else
            for (; i < count; i++) to[i] = rounded(clip(from[i] * m[i], low[i], high[i]));
        if (factor)
            for (i = 0; i < count; i++) to[i] *= factor[one ? 0 : i];
    }
}

/* `quant.integer_functions._gdn_piece`, one number */
static inline double gdn_number(double x, double norm, double mantissa, int64_t shift, int inverse,
                                int with_root) {
    int64_t k;
    double divisor;
    norm = norm < 1 ? 1 : norm;
    if (with_root) {
        k = (52 - length_of(norm)) >> 1;
        divisor = integer_root(norm * power_of_two(2 * k));
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
AVX2 static inline __m256d masked4(__m256d x, int64_t bits) {
    return _mm256_and_pd(x, _mm256_castsi256_pd(_mm256_set1_epi64x(bits)));
}

/* `gdn_number` with a root, four numbers; mantissa, shift, low, high of their channels.
 *
 * A norm is shifted to 51 or 52 bits before its root is cut to a whole number: that leaves the root's 26
 * highest bits, so its other mantissa bits are cleared. The square root and the quotient are rounded
 * correctly, and neither rounding reaches or crosses a whole number or a half that the exact value does not:
 * the root of n < 2^52 is at least 2^-27 below the next whole number, and a / b with a < 2^52 at least 1 / (2
 * b) > a / b 2^-53 from the next half. Where the reference limits its powers of two, results are clipped or
 * 0.
 */
AVX2 static inline __m128i gdn4(__m128i x, __m128i norms, __m256d mantissa, __m256i shift, __m256d low,
                                __m256d high, int inverse) {
    const __m256d sign = _mm256_set1_pd(-0.0), below_half = _mm256_set1_pd(BELOW_HALF);
    const __m256d number = _mm256_cvtepi32_pd(x);
    const __m256d norm = _mm256_cvtepi32_pd(_mm_max_epi32(norms, _mm_set1_epi32(1)));
    const __m256d root = masked4(_mm256_sqrt_pd(norm), ~((1LL << 27) - 1)); /* times 2^-k */
    const __m256i bias = _mm256_set1_epi64x(1023);
    __m256d result;
    if (inverse) {
        const __m256d power = masked4(root, 0x7ffLL << 52); /* 2^(25 - k) */
        const __m256d whole = _mm256_or_pd(masked4(root, (1LL << 52) - 1), _mm256_set1_pd(0x1p25));
        const __m256d factor = _mm256_floor_pd(_mm256_add_pd(
            _mm256_mul_pd(_mm256_mul_pd(whole, mantissa), _mm256_set1_pd(0x1p-11)), below_half));
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

/* `gdn_number` with a root, eight numbers, where float32 settles it; else `settled` is 0 somewhere and `gdn4`
 * must say.
 *
 * `scale` is mantissa * 2^-shift, exact in float32. In units of 2^-24, the relative errors are: of the norm
 * as a float32, halved by the root, 0.5; of the processor's 1/sqrt, at most 1.5 * 2^-12, after Newton's
 * step 1.5 * 1.5^2 < 3.4; of that step's roundings 0.5 for the square, which counts half, 0.5 for the product
 * near 1/2, 1 for the difference near 1, 1 for the result; 1 for each of the two products after it; and the
 * reference's own cut of the root to 26 bits moves 0.5. Together 9.4, of which `margin` is 10. The inverse
 * has a product more and cuts its factor, which for mantissas of 10 bits or more moves less than 0.5: 10.9,
 * margin 11. So where a number with its margin around it lies between two halves, the reference rounds to the
 * same; and where it was clipped to a limit below 2^16, the reference's is beyond the limit or less than 1/2
 * inside.
 */
AVX2 static inline __m256i gdn8(__m256i x, __m256i norms, __m256 scale, __m256i low, __m256i high,
                                int inverse, int *settled) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX)),
                 margin = _mm256_set1_ps(inverse ? 11 * 0x1p-24f : 10 * 0x1p-24f);
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

AVX2 static void gdn_avx2(int32_t *restrict out, const int32_t *restrict x, const int32_t *restrict norm,
                          int n, const Step *s) {
    for (int start = 0; start < n; start += s->period) {
        const int count = n - start < s->period ? n - start : s->period;
        int i = 0;
        while (i + 4 <= count) {
            const int eight = i + 8 <= count;
            if (s->scale && eight) {
                int settled;
                const __m256i q =
                    gdn8(_mm256_loadu_si256((const __m256i *)(x + start + i)),
                         _mm256_loadu_si256((const __m256i *)(norm + start + i)),
                         _mm256_loadu_ps(s->scale + i), _mm256_loadu_si256((const __m256i *)(s->low + i)),
                         _mm256_loadu_si256((const __m256i *)(s->high + i)), s->gdn.inverse, &settled);
                if (settled) {
                    _mm256_storeu_si256((__m256i *)(out + start + i), q);
                    i += 8;
                    continue;
                }
            }
            for (const int end = i + (eight ? 8 : 4); i < end; i += 4) {
                const __m256i shift = _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)(s->shift + i)));
                const __m256d low = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(s->low + i)));
                const __m256d high = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(s->high + i)));
                const __m128i q = gdn4(_mm_loadu_si128((const __m128i *)(x + start + i)),
                                       _mm_loadu_si128((const __m128i *)(norm + start + i)),
                                       _mm256_loadu_pd(s->multiplier + i), shift, low, high, s->gdn.inverse);
                _mm_storeu_si128((__m128i *)(out + start + i), q);
            }
        }
        for (; i < count; i++) {
            const double q = gdn_number(x[start + i], norm[start + i], s->multiplier[i], s->shift[i],
                                        s->gdn.inverse, s->gdn.root);
            out[start + i] = (int32_t)clip(q, s->low[i], s->high[i]);
        }
    }
}
#endif

CLONES static void gdn(int32_t *restrict out, const int32_t *restrict x, const int32_t *restrict norm, int n,
                       const Step *s) {
    for (int start = 0; start < n; start += s->period) {
        const int count = n - start < s->period ? n - start : s->period;
        for (int i = 0; i < count; i++) {
            const double q = gdn_number(x[start + i], norm[start + i], s->multiplier[i], s->shift[i],
                                        s->gdn.inverse, s->gdn.root);
            out[start + i] = (int32_t)clip(q, s->low[i], s->high[i]);
        }
    }
}

CLONES static void simple(const Step *s, int32_t *restrict out, const int32_t *restrict a,
                          const int32_t *restrict b, int n) {
    const int period = s->period;
    switch (s->op) {
    case ADD: {
        const int32_t low = s->low[0], high = s->high[0];
        for (int i = 0; i < n; i++) {
            const int32_t v = a[i] + b[i];
            out[i] = v < low ? low : v > high ? high : v;
        }
        break;
    }
    case ADDC: {
        const int32_t low = s->low[0], high = s->high[0];
        for (int start = 0; start < n; start += period) {
            const int count = n - start < period ? n - start : period;
            for (int i = 0; i < count; i++) {
                const int32_t v = a[start + i] + s->constant[i];
                out[start + i] = v < low ? low : v > high ? high : v;
            }
        }
        break;
    }
    case PRODUCT:
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
            const int32_t low = s->low[0], high = s->high[0];
            for (int i = 0; i < n; i++) out[i] = a[i] < low ? low : a[i] > high ? high : a[i];
        } else
            for (int start = 0; start < n; start += period) {
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
        if (s->leaky.tie_free && __builtin_cpu_supports("avx2")) i = leaky_tie_free_avx2(out, a, n, m);
#endif
        for (; i < n; i++) {
            const int32_t r = rounded(a[i] * m);
            out[i] = a[i] < 0 ? r : a[i];
        }
        break;
    }
    case TABLE:
        for (int i = 0; i < n; i++) {
            int32_t place = a[i] - s->table.first;
            place = place < 0 ? 0 : place > s->table.last ? s->table.last : place;
            out[i] = s->entries[place];
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

CLONES void store(const int32_t *restrict x, const Array *array, int64_t pixel, int64_t step, int pixels,
                  int channels) {
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
            store(x + (int64_t)p * channels + a * run, array, row * columns + (pixel + p) % columns, 1, 1,
                  run);
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
            if (s->store.side)
                store_shuffled(a, &arrays[s->b], pixel, pixels, channels, s->store.side, s->store.width);
            else
                store(a, &arrays[s->b], pixel, step, pixels, channels);
            break;
        case RESCALE: rescale(out, a, n, s); break;
        case GDN:
#if X86
            if (s->gdn.vectors && __builtin_cpu_supports("avx2")) {
                gdn_avx2(out, a, b, n, s);
                break;
            }
#endif
            gdn(out, a, b, n, s);
            break;
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

/* Steps on arrays alone, (pixels, channels). */
int elementwise(int64_t pixels, int channels, const Step *steps, int step_count, const Array *arrays,
                int register_count, int threads) {
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
            steps_on_tile(steps, step_count, arrays, registers, registers + register_size, register_size,
                          t * tile, 1, count, channels);
        }
        free(registers);
    }
    return failed;
}
