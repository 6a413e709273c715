/* Products of layers tap by tap, and elementwise steps on arrays. */

#include <stdlib.h>

#include "arithmetic.h"

static const int SIZE[] = {1, 1, 2, 4}; /* bytes of S8, U8, S16, S32 */

/* acc[p][0..15] = bias + sum over taps and inputs. x[tap * GROUP + p]: where pixel p's inputs of a tap begin.
 * A row of acc may be shorter than 16: pixels are written in their order. */
typedef void Micro(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias,
                   int32_t *acc, int64_t row);

static void micro_s16(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias,
                      int32_t *acc, int64_t row) {
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

static void micro_u8(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias,
                     int32_t *acc, int64_t row) {
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
__attribute__((target("avx2"))) static void micro_s16_avx2(const char *const *x, int taps, int inputs,
                                                           const char *weights, const int32_t *bias,
                                                           int32_t *acc, int64_t row) {
    __m256i sums[GROUP][2];
    for (int p = 0; p < GROUP; p++)
        for (int h = 0; h < 2; h++) sums[p][h] = _mm256_loadu_si256((const __m256i *)bias + h);
    for (int tap = 0; tap < taps; tap++, x += GROUP) {
        const char *from[GROUP];
        for (int p = 0; p < GROUP; p++) from[p] = x[p];
        for (int i = 0; i < inputs; i += 2, weights += 4 * BLOCK) {
            const __m256i w0 = _mm256_loadu_si256((const __m256i *)weights),
                          w1 = _mm256_loadu_si256((const __m256i *)weights + 1);
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

__attribute__((target("avx512f,avx512bw,avx512vl"))) static void
micro_s16_avx512(const char *const *x, int taps, int inputs, const char *weights, const int32_t *bias,
                 int32_t *acc, int64_t row) {
    __m512i sums[GROUP];
    for (int p = 0; p < GROUP; p++) sums[p] = _mm512_loadu_si512(bias);
    for (int tap = 0; tap < taps; tap++, x += GROUP)
        for (int i = 0; i < inputs; i += 2, weights += 4 * BLOCK) {
            const __m512i w = _mm512_loadu_si512(weights);
#pragma GCC unroll 6
            for (int p = 0; p < GROUP; p++)
                sums[p] = _mm512_add_epi32(sums[p],
                                           _mm512_madd_epi16(_mm512_set1_epi32(four_bytes(x[p] + 2 * i)), w));
        }
    for (int p = 0; p < GROUP; p++) _mm512_storeu_si512(acc + p * row, sums[p]);
}

/* One block of outputs, or two: `after` is how many bytes the weights of the second lie behind those of the
 * first. */
VNNI static inline __attribute__((always_inline)) void
blocks_vnni(const char *const *x, int taps, int bytes, const char *weights, int64_t after,
            const int32_t *bias, int32_t *acc, int64_t row, const int eight_bits, const int blocks) {
    __m512i sums[2][GROUP];
    for (int n = 0; n < blocks; n++)
        for (int p = 0; p < GROUP; p++) sums[n][p] = _mm512_loadu_si512(bias + n * BLOCK);
    for (int tap = 0; tap < taps; tap++, x += GROUP)
        for (int i = 0; i < bytes; i += 4, weights += 4 * BLOCK) {
            const __m512i w[2] = {_mm512_loadu_si512(weights),
                                  _mm512_loadu_si512(weights + (blocks > 1 ? after : 0))};
#pragma GCC unroll 6
            for (int p = 0; p < GROUP; p++) {
                const __m512i some = _mm512_set1_epi32(four_bytes(x[p] + i));
#pragma GCC unroll 2
                for (int n = 0; n < blocks; n++)
                    sums[n][p] = eight_bits ? _mm512_dpbusd_epi32(sums[n][p], some, w[n])
                                            : _mm512_dpwssd_epi32(sums[n][p], some, w[n]);
            }
        }
    for (int n = blocks - 1; n >= 0; n--)
        for (int p = 0; p < GROUP; p++) _mm512_storeu_si512(acc + p * row + n * BLOCK, sums[n][p]);
}

VNNI static void micro_u8_vnni(const char *const *x, int taps, int inputs, const char *weights,
                               const int32_t *bias, int32_t *acc, int64_t row) {
    blocks_vnni(x, taps, inputs, weights, 0, bias, acc, row, 1, 1);
}

VNNI static void micro_s16_vnni(const char *const *x, int taps, int inputs, const char *weights,
                                const int32_t *bias, int32_t *acc, int64_t row) {
    blocks_vnni(x, taps, 2 * inputs, weights, 0, bias, acc, row, 0, 1);
}

/* Two blocks of outputs: twelve chains of sums, which hide the latency of an addition. An EPYC makes
 * 85 percent of the 16-bit products a second that its units can. */
VNNI static void two_blocks_vnni(const char *const *x, int taps, int inputs, const char *weights,
                                 int64_t after, const int32_t *bias, int32_t *acc, int64_t row, int type) {
    if (type == U8)
        blocks_vnni(x, taps, inputs, weights, after, bias, acc, row, 1, 2);
    else
        blocks_vnni(x, taps, 2 * inputs, weights, after, bias, acc, row, 0, 2);
}
#endif

static Micro *micro_for(int type) {
#if X86
    if (type == U8 && HAS_VNNI) return micro_u8_vnni;
    if (type == S16 && HAS_VNNI) return micro_s16_vnni;
    if (type == S16 && HAS_AVX512) return micro_s16_avx512;
    if (type == S16 && HAS_AVX2) return micro_s16_avx2;
#endif
    return type == U8 ? micro_u8 : micro_s16;
}

/* The products of a layer, each tile followed by `steps`, whose register 0 holds the accumulators. Returns 1
 * where memory ran out. */
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
        const char **inputs = malloc(sizeof(char *) * job->count * tile);
        if (!registers || !inputs) failed = 1;
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
                            const int column = g + p < pixels ? g + p : pixels - 1;
                            const int y = i * job->stride_rows + job->taps[2 * tap];
                            const int x = (j + column) * job->stride_columns + job->taps[2 * tap + 1];
                            const int inside = y >= 0 && y < job->height && x >= 0 && x < job->width;
                            inputs[(g / GROUP * job->count + tap) * GROUP + p] =
                                inside ? job->x +
                                             ((image * job->height + y) * job->width + x) * job->inputs * size
                                       : job->padding;
                        }
                /* last to first: what the last block of a pixel writes beyond it, the first of the next pixel
                 * writes over */
                int block = blocks - 1;
#if X86
                for (; HAS_VNNI && block > 0; block -= 2)
                    for (int g = 0; g < padded; g += GROUP)
                        two_blocks_vnni(inputs + (int64_t)g * job->count, job->count, job->inputs,
                                        job->weights + (block - 1) * block_bytes, block_bytes,
                                        job->bias + (block - 1) * BLOCK,
                                        registers + (int64_t)g * outputs + (block - 1) * BLOCK, outputs,
                                        job->type);
#endif
                for (; block >= 0; block--)
                    for (int g = 0; g < padded; g += GROUP)
                        micro(inputs + (int64_t)g * job->count, job->count, job->inputs,
                              job->weights + block * block_bytes, job->bias + block * BLOCK,
                              registers + (int64_t)g * outputs + block * BLOCK, outputs);
                const int64_t pixel =
                    (image * job->all_rows + (int64_t)i * job->spread + job->first_row) * job->all_columns +
                    (int64_t)j * job->spread + job->first_column;
                steps_on_tile(steps, step_count, arrays, registers, registers + register_size, register_size,
                              pixel, job->spread, pixels, outputs);
            }
        }
        free(registers);
        free(inputs);
    }
    return failed;
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
