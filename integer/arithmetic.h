/* Rounding, powers of two and integer roots in float64, as `integer/reference.py` has them. */

#ifndef LICQ_ARITHMETIC_H
#define LICQ_ARITHMETIC_H

#include <math.h>
#include <string.h>

#include "kernels.h"

#define BELOW_HALF 0.49999999999999994

static inline double clip(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

/* round_half_away of a double; what does not fit int32 must have been clipped before */
static inline int32_t rounded(double p) {
    return (int32_t)(p + copysign(BELOW_HALF, p));
}

#if X86
static inline int32_t four_bytes(const char *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* round_half_away(x * m) clipped, four numbers */
AVX2 static inline __m128i rescale4(__m128i x, __m256d m, __m256d low, __m256d high) {
    __m256d p = _mm256_mul_pd(_mm256_cvtepi32_pd(x), m);
    p = _mm256_min_pd(_mm256_max_pd(p, low), high);
    const __m256d half = _mm256_or_pd(_mm256_and_pd(p, _mm256_set1_pd(-0.0)), _mm256_set1_pd(BELOW_HALF));
    return _mm256_cvttpd_epi32(_mm256_add_pd(p, half));
}

/* The same of eight numbers with tie-free multipliers (`tie_free_multiplier` in integer/exactness.py), whose
 * products the processor's own rounding to nearest rounds alike. */
AVX2 static inline __m256i rescale8(__m256i x, __m256d m0, __m256d m1, __m256i low, __m256i high) {
    const __m128i first =
        _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)), m0));
    const __m128i second =
        _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1)), m1));
    return _mm256_min_epi32(_mm256_max_epi32(_mm256_set_m128i(second, first), low), high);
}
#endif

/* floor(sqrt(n)) of an integer n below 2^52 */
static inline double integer_root(double n) {
    double root = floor(sqrt(n));
    root -= root * root > n ? 1.0 : 0.0;
    root += (root + 1) * (root + 1) <= n ? 1.0 : 0.0;
    return root;
}

static inline int64_t bits_of(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return bits;
}
static inline double power_of_two(int64_t exponent) {
    int64_t bits = (exponent + 1023) << 52;
    double x;
    memcpy(&x, &bits, 8);
    return x;
}
/* bits of an integer > 0 */
static inline int64_t length_of(double x) {
    return (bits_of(x) >> 52) - 1022;
}
static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline double half_away(double x) {
    return copysign(floor(fabs(x) + BELOW_HALF), x);
}

/* `_gdn_piece` of quant/integer_functions.py, one number */
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

#endif
