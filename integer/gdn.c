/* GDN and IGDN in float64 and float32, equal to `integer_gdn` of quant/integer_functions.py. */

#include "arithmetic.h"

#if X86
AVX2 static inline __m256d masked4(__m256d x, int64_t bits) {
    return _mm256_and_pd(x, _mm256_castsi256_pd(_mm256_set1_epi64x(bits)));
}

/* `gdn_number` with a root, four numbers; mantissa, shift, low, high of their channels.
 *
 * A norm is shifted to 51 or 52 bits before its root is cut to an integer: that leaves the root's 26 highest
 * bits, so its other mantissa bits are cleared. The square root and the quotient are rounded correctly, and
 * neither rounding reaches or crosses an integer or a half that the exact value does not: the root of n <
 * 2^52 is at least 2^-27 below the next integer, and a / b with a < 2^52 at least 1 / (2 b) > a / b 2^-53
 * from the next half. Where the reference limits its powers of two, results are clipped or 0.
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
        const __m256d integer = _mm256_or_pd(masked4(root, (1LL << 52) - 1), _mm256_set1_pd(0x1p25));
        const __m256d factor = _mm256_floor_pd(_mm256_add_pd(
            _mm256_mul_pd(_mm256_mul_pd(integer, mantissa), _mm256_set1_pd(0x1p-11)), below_half));
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
            if (s->gdn.scale && eight) {
                int settled;
                const __m256i q = gdn8(
                    _mm256_loadu_si256((const __m256i *)(x + start + i)),
                    _mm256_loadu_si256((const __m256i *)(norm + start + i)),
                    _mm256_loadu_ps(s->gdn.scale + i), _mm256_loadu_si256((const __m256i *)(s->gdn.low + i)),
                    _mm256_loadu_si256((const __m256i *)(s->gdn.high + i)), s->gdn.inverse, &settled);
                if (settled) {
                    _mm256_storeu_si256((__m256i *)(out + start + i), q);
                    i += 8;
                    continue;
                }
            }
            for (const int end = i + (eight ? 8 : 4); i < end; i += 4) {
                const __m256i shift =
                    _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)(s->gdn.shift + i)));
                const __m256d low = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(s->gdn.low + i)));
                const __m256d high = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(s->gdn.high + i)));
                const __m128i q =
                    gdn4(_mm_loadu_si128((const __m128i *)(x + start + i)),
                         _mm_loadu_si128((const __m128i *)(norm + start + i)),
                         _mm256_loadu_pd(s->gdn.mantissa + i), shift, low, high, s->gdn.inverse);
                _mm_storeu_si128((__m128i *)(out + start + i), q);
            }
        }
        for (; i < count; i++) {
            const double q = gdn_number(x[start + i], norm[start + i], s->gdn.mantissa[i], s->gdn.shift[i],
                                        s->gdn.inverse, s->gdn.with_root);
            out[start + i] = (int32_t)clip(q, s->gdn.low[i], s->gdn.high[i]);
        }
    }
}
#endif

CLONES static void gdn_plain(int32_t *restrict out, const int32_t *restrict x, const int32_t *restrict norm,
                             int n, const Step *s) {
    for (int start = 0; start < n; start += s->period) {
        const int count = n - start < s->period ? n - start : s->period;
        for (int i = 0; i < count; i++) {
            const double q = gdn_number(x[start + i], norm[start + i], s->gdn.mantissa[i], s->gdn.shift[i],
                                        s->gdn.inverse, s->gdn.with_root);
            out[start + i] = (int32_t)clip(q, s->gdn.low[i], s->gdn.high[i]);
        }
    }
}

void gdn(int32_t *out, const int32_t *x, const int32_t *norm, int n, const Step *s) {
#if X86
    if (s->gdn.fits_float64 && HAS_AVX2) {
        gdn_avx2(out, x, norm, n, s);
        return;
    }
#endif
    gdn_plain(out, x, norm, n, s);
}
