/* Attention head by head: scores, softmax and weighted sum of a few queries at a time. */

#include <stdlib.h>

#include "arithmetic.h"

enum { QUERIES = 16 };

/* out[t][0..n) = sum over pairs of a[t][pair] b[pair][0..n), both held as pairs of int16; n a multiple of 8
 */
CLONES static void pair_products(const int16_t *restrict a, const int16_t *restrict b, int32_t *restrict out,
                                 int rows, int pairs, int n) {
    for (int t = 0; t < rows; t++) {
        int32_t *to = out + (int64_t)t * n;
        memset(to, 0, sizeof(int32_t) * n);
        for (int p = 0; p < pairs; p++) {
            const int32_t first = a[(int64_t)t * 2 * pairs + 2 * p],
                          second = a[(int64_t)t * 2 * pairs + 2 * p + 1];
            const int16_t *from = b + (int64_t)p * 2 * n;
            for (int i = 0; i < n; i++) to[i] += first * from[2 * i] + second * from[2 * i + 1];
        }
    }
}

#if X86
/* `halves` times 8 columns of four rows */
AVX2 static inline void pair_tile(const int16_t *const *from, const int16_t *b, int32_t *const *to, int pairs,
                                  int n, const int halves) {
    __m256i sums[4][2];
    for (int r = 0; r < 4; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int p = 0; p < pairs; p++, b += 2 * n) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i *)b),
                      w1 = halves > 1 ? _mm256_loadu_si256((const __m256i *)b + 1) : w0;
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

AVX2 static void pair_products_avx2(const int16_t *restrict a, const int16_t *restrict b,
                                    int32_t *restrict out, int rows, int pairs, int n) {
    for (int t = 0; t < rows; t += 4) {
        const int16_t *from[4];
        for (int r = 0; r < 4; r++) from[r] = a + (int64_t)(t + r < rows ? t + r : t) * 2 * pairs;
        for (int i = 0; i < n; i += 16) {
            int32_t *to[4];
            for (int r = 0; r < 4; r++) to[r] = out + (int64_t)(t + r < rows ? t + r : t) * n + i;
            if (i + 16 <= n)
                pair_tile(from, b + 2 * i, to, pairs, n, 2);
            else
                pair_tile(from, b + 2 * i, to, pairs, n, 1);
        }
    }
}
#endif

static void multiply_pairs(const int16_t *a, const int16_t *b, int32_t *out, int rows, int pairs, int n) {
#if X86
    if (HAS_AVX2) {
        pair_products_avx2(a, b, out, rows, pairs, n);
        return;
    }
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

/* `fixed_softmax` of quant/integer_functions.py of one row, times a scale, as int16 */
CLONES static void softmax_row(int32_t *restrict score, const int32_t *restrict offset, int keys,
                               const float *table, int last, double scale, int low, int high,
                               int16_t *restrict out, float *restrict weight) {
    int32_t top = INT32_MIN;
    if (offset)
        for (int i = 0; i < keys; i++) score[i] += offset[i];
    for (int i = 0; i < keys; i++) top = score[i] > top ? score[i] : top;
    for (int i = 0; i < keys; i++) {
        const int32_t below = top - score[i];
        score[i] = below > last ? last : below;
    }
    for (int i = 0; i < keys; i++) weight[i] = table[score[i]];
    double total = 0;
    if (keys <= 4096) {
        int32_t sum = 0;
        for (int i = 0; i < keys; i++) sum += (int32_t)weight[i];
        total = sum;
    } else
        for (int i = 0; i < keys; i++) total += weight[i];
    const float factor = softmax_factor(total);
    for (int i = 0; i < keys; i++) {
        const float p = floorf(weight[i] * factor + 0.49999997f);
        out[i] = (int16_t)rounded(clip(p * scale, low, high));
    }
}

#if X86
/* The same of a row of sums of products of queries and keys, with tie-free scales, for up to 4096 keys. Full
 * vectors of 8 are read and written. */
AVX2 static void softmax_row_avx2(int32_t *score, const int32_t *offset, int head, const Attention *job,
                                  int16_t *out, float *weight) {
    const int keys = job->keys, tail = keys % 8;
    const __m256d score_scale = _mm256_set1_pd(job->score_scale[head]),
                  weight_scale = _mm256_set1_pd(job->weight_scale[head]);
    const __m256i score_low = _mm256_set1_epi32(job->score_low),
                  score_high = _mm256_set1_epi32(job->score_high);
    const __m256i weight_low = _mm256_set1_epi32(job->weight_low),
                  weight_high = _mm256_set1_epi32(job->weight_high);
    const __m256i last = _mm256_set1_epi32(job->last), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i all = _mm256_set1_epi32(-1),
                  some = tail ? _mm256_cmpgt_epi32(_mm256_set1_epi32(tail), lanes) : all;
    __m256i most = _mm256_set1_epi32(INT32_MIN), sum = _mm256_setzero_si256();
    for (int i = 0; i < keys; i += 8) {
        const __m256i there = i + 8 <= keys ? all : some;
        __m256i s = rescale8(_mm256_loadu_si256((const __m256i *)(score + i)), score_scale, score_scale,
                             score_low, score_high);
        if (offset)
            s = _mm256_add_epi32(s, i + 8 <= keys ? _mm256_loadu_si256((const __m256i *)(offset + i))
                                                  : _mm256_maskload_epi32(offset + i, some));
        s = _mm256_blendv_epi8(_mm256_set1_epi32(-(1 << 30)), s, there);
        _mm256_storeu_si256((__m256i *)(score + i), s);
        most = _mm256_max_epi32(most, s);
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    const __m256i top = _mm256_broadcastd_epi32(half);
    for (int i = 0; i < keys; i += 8) {
        const __m256i below =
            _mm256_min_epi32(_mm256_sub_epi32(top, _mm256_loadu_si256((const __m256i *)(score + i))), last);
        __m256 w = _mm256_i32gather_ps(job->table, below, 4);
        w = _mm256_and_ps(w, _mm256_castsi256_ps(i + 8 <= keys ? all : some));
        _mm256_storeu_ps(weight + i, w);
        sum = _mm256_add_epi32(sum, _mm256_cvttps_epi32(w));
    }
    half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    const __m256 factor =
        _mm256_set1_ps(softmax_factor(_mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)))));
    for (int i = 0; i < keys; i += 8) {
        const __m256 p =
            _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(weight + i), factor), _mm256_set1_ps(0.49999997f));
        const __m256i q =
            rescale8(_mm256_cvttps_epi32(p), weight_scale, weight_scale, weight_low, weight_high);
        _mm_storeu_si128((__m128i *)(out + i),
                         _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
    }
}
#endif

/* pairs of inner numbers: (inner pairs, keys8, 2) */
CLONES static void pack_keys(const int16_t *restrict k, int64_t step, int keys, int inner,
                             int16_t *restrict packed, int keys8) {
    if (inner % 2 == 0)
        for (int p = 0; p < inner / 2; p++)
            for (int i = 0; i < keys; i++)
                memcpy(packed + ((int64_t)p * keys8 + i) * 2, k + i * step + 2 * p, 4);
    else
        for (int i = 0; i < keys; i++)
            for (int c = 0; c < inner; c++)
                packed[((int64_t)(c / 2) * keys8 + i) * 2 + c % 2] = k[i * step + c];
}

/* pairs of keys: (pairs of keys, width8, 2) */
CLONES static void pack_values(const int16_t *restrict v, int64_t step, int keys, int width,
                               int16_t *restrict packed, int width8) {
    for (int i = 0; i + 1 < keys; i += 2) {
        int16_t *restrict to = packed + (int64_t)i * width8;
        const int16_t *restrict first = v + i * step, *restrict second = first + step;
        for (int c = 0; c < width; c++) {
            to[2 * c] = first[c];
            to[2 * c + 1] = second[c];
        }
    }
    if (keys % 2)
        for (int c = 0; c < width; c++)
            packed[(int64_t)(keys - 1) * width8 + 2 * c] = v[(keys - 1) * step + c];
}

int attention(const Attention *job) {
    const int keys = job->keys, inner = job->inner, width = job->width;
    const int keys8 = (keys + 7) / 8 * 8, width8 = (width + 7) / 8 * 8, inner2 = (inner + 1) / 2,
              keys2 = (keys + 1) / 2;
    const int64_t lines = job->batch * job->heads;
    int failed = 0;
#pragma omp parallel num_threads(job->threads)
    {
        int16_t *packed_k = calloc((size_t)inner2 * 2 * keys8, 2),
                *packed_v = calloc((size_t)keys2 * 2 * width8, 2);
        int16_t *rows = calloc((size_t)QUERIES * 2 * inner2, 2),
                *weights = calloc((size_t)QUERIES * 2 * keys2 + 8, 2);
        int32_t *scores = malloc(sizeof(int32_t) * QUERIES * keys8),
                *results = malloc(sizeof(int32_t) * QUERIES * width8);
        float *row = malloc(sizeof(float) * keys8);
        if (!packed_k || !packed_v || !rows || !weights || !scores || !results || !row) failed = 1;
#pragma omp for schedule(static)
        for (int64_t line = 0; line < lines; line++) {
            if (failed) continue;
            const int head = (int)(line % job->heads);
            const int64_t kind = job->kind ? job->kind[line / job->heads] : 0;
            const int64_t image = line / job->heads;
            pack_keys(job->k + image * job->k_steps[0] + head * job->k_steps[1], job->k_steps[2], keys, inner,
                      packed_k, keys8);
            pack_values(job->v + image * job->v_steps[0] + head * job->v_steps[1], job->v_steps[2], keys,
                        width, packed_v, width8);
            const int16_t *q = job->q + image * job->q_steps[0] + head * job->q_steps[1];
            const double score_scale = job->score_scale[head], weight_scale = job->weight_scale[head];
            for (int t = 0; t < job->queries; t += QUERIES) {
                const int many = job->queries - t < QUERIES ? job->queries - t : QUERIES;
                for (int r = 0; r < many; r++)
                    memcpy(rows + (int64_t)r * 2 * inner2, q + (t + r) * job->q_steps[2],
                           sizeof(int16_t) * inner);
                multiply_pairs(rows, packed_k, scores, many, inner2, keys8);
                for (int r = 0; r < many; r++) {
                    int32_t *score = scores + (int64_t)r * keys8;
                    const int64_t row_number = (kind * job->heads + head) * job->queries + t + r;
                    const int32_t *offset = job->offset ? job->offset + row_number * keys : 0;
                    int16_t *weight = weights + (int64_t)r * 2 * keys2;
                    if (job->blank && job->blank[row_number]) {
                        memset(weight, 0, sizeof(int16_t) * keys);
                        continue;
                    }
#if X86
                    if (job->tie_free && keys <= 4096 && HAS_AVX2) {
                        softmax_row_avx2(score, offset, head, job, weight,
                                         row); /* may write into the next row, which comes next */
                        continue;
                    }
#endif
                    for (int i = 0; i < keys; i++)
                        score[i] = rounded(clip(score[i] * score_scale, job->score_low, job->score_high));
                    softmax_row(score, offset, keys, job->table, job->last, weight_scale, job->weight_low,
                                job->weight_high, weight, row);
                }
                multiply_pairs(weights, packed_v, results, many, keys2, width8);
                for (int r = 0; r < many; r++)
                    store_pixels(results + (int64_t)r * width8, &job->out, line * job->queries + t + r, 1, 1,
                                 width);
            }
        }
        free(packed_k);
        free(packed_v);
        free(rows);
        free(weights);
        free(scores);
        free(results);
        free(row);
    }
    return failed;
}
