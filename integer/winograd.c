/* Convolutions by a 3x3 window with a quarter of the multiplications: F(4x4, 3x3) of Winograd, exact on
 * integers.
 *
 * A tile of 4x4 outputs needs 6x6 inputs d and a window g: y = A'[(G g G') . (B' d B)]A, with products number
 * by number, summed over the inputs. To stay on integers, G's rows are multiplied by 4, 6, 6, 24, 24 and 1
 * and the sums by what is left of 24, so that the result is 24^2 y = 64 * 9 y. All of it is arithmetic modulo
 * 2^32, in which sums may wrap around: 9 has an inverse, and of 64 y the lower 32 bits say y, as long as |y|
 * < 2^25. `integer/winograd.py` proves that, and that transformed inputs and windows fit 16 bits.
 *
 * A convolution with a stride is one with stride 1 over the phases of its input, taken as further channels; a
 * transposed one gives the phases of its output as further channels. A window of a phase that has fewer than
 * 3 taps along an axis leaves out one or two of that axis' six products.
 */

#include <stdlib.h>

#include "arithmetic.h"

enum {
    SIDE = 6,
    POSITIONS = 36,
    OUT = 4,
    MAX_TILES = 24,
    TOGETHER = 2,
    VNNI_TILES = 12, /* chains of sums that hide the latency of vpdpwssd */
    AHEAD = 4096     /* bytes of weights that are fetched early: those of a layer exceed the second cache */
};

#if X86

/* B' d of six vectors */
AVX2 static inline void input_side(const __m256i *in, __m256i *out) {
    const __m256i d0 = in[0], d1 = in[1], d2 = in[2], d3 = in[3], d4 = in[4], d5 = in[5];
    const __m256i d42 = _mm256_sub_epi16(d4, d2), d31 = _mm256_sub_epi16(d3, d1);
    out[0] = _mm256_add_epi16(_mm256_slli_epi16(_mm256_sub_epi16(d0, d2), 2), d42);
    const __m256i a = _mm256_sub_epi16(d4, _mm256_slli_epi16(d2, 2)),
                  b = _mm256_sub_epi16(d3, _mm256_slli_epi16(d1, 2));
    out[1] = _mm256_add_epi16(a, b);
    out[2] = _mm256_sub_epi16(a, b);
    const __m256i twice = _mm256_add_epi16(d31, d31);
    out[3] = _mm256_add_epi16(d42, twice);
    out[4] = _mm256_sub_epi16(d42, twice);
    out[5] = _mm256_sub_epi16(_mm256_sub_epi16(d5, d3), _mm256_slli_epi16(d31, 2));
}

/* B' d B of 16 channels; to[position * step]: 16 numbers */
AVX2 static inline void input_tile(const char *const *from, int64_t byte, int16_t *to, int64_t step) {
    __m256i half[POSITIONS];
    for (int column = 0; column < SIDE; column++) {
        __m256i in[SIDE], out[SIDE];
        for (int i = 0; i < SIDE; i++)
            in[i] = _mm256_loadu_si256((const __m256i *)(from[i * SIDE + column] + byte));
        input_side(in, out);
        for (int i = 0; i < SIDE; i++) half[i * SIDE + column] = out[i];
    }
    for (int row = 0; row < SIDE; row++) {
        __m256i out[SIDE];
        input_side(half + row * SIDE, out);
        for (int i = 0; i < SIDE; i++) _mm256_storeu_si256((__m256i *)(to + (row * SIDE + i) * step), out[i]);
    }
}

/* A' m of six vectors, times 24, 12, 6, 6: where all terms share powers of two, these are left out */
AVX2 static inline void output_side(const __m256i *in, __m256i *out) {
    const __m256i s = _mm256_add_epi32(in[1], in[2]), d = _mm256_sub_epi32(in[1], in[2]);
    const __m256i t = _mm256_add_epi32(in[3], in[4]), e = _mm256_sub_epi32(in[3], in[4]);
    const __m256i first = _mm256_add_epi32(_mm256_slli_epi32(in[0], 1), _mm256_slli_epi32(in[0], 2));
    const __m256i last = _mm256_add_epi32(_mm256_slli_epi32(in[5], 1), _mm256_slli_epi32(in[5], 2));
    out[0] = _mm256_add_epi32(_mm256_add_epi32(first, _mm256_slli_epi32(s, 2)), t);
    out[1] = _mm256_add_epi32(_mm256_slli_epi32(d, 1), e);
    out[2] = _mm256_add_epi32(s, t);
    out[3] = _mm256_add_epi32(_mm256_add_epi32(d, _mm256_slli_epi32(e, 1)), last);
}

#define NINTH 0x38e38e39 /* 9 * NINTH = 1 modulo 2^32 */

/* A' m A of 8 outputs of a tile; m[position * step]; to[4 * row + column]: where the results of a pixel go,
 * plus bias, or to what is there */
AVX2 static inline void output_tile(const int32_t *m, int64_t step, const int32_t *bias, int32_t *const *to) {
    static const int TWOS[OUT] = {3, 2, 1, 1}; /* factors of two in 24, 12, 6, 6 */
    __m256i half[OUT * SIDE];
    for (int column = 0; column < SIDE; column++) {
        __m256i in[SIDE], out[OUT];
        for (int i = 0; i < SIDE; i++)
            in[i] = _mm256_loadu_si256((const __m256i *)(m + (i * SIDE + column) * step));
        output_side(in, out);
        for (int i = 0; i < OUT; i++) half[i * SIDE + column] = out[i];
    }
    for (int row = 0; row < OUT; row++) {
        __m256i out[OUT];
        output_side(half + row * SIDE, out);
        for (int i = 0; i < OUT; i++) {
            const __m256i y = _mm256_mullo_epi32(out[i], _mm256_set1_epi32(NINTH));
            __m256i *target = (__m256i *)to[row * OUT + i];
            const __m256i more = _mm256_loadu_si256(bias ? (const __m256i *)bias : target);
            _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_srai_epi32(y, TWOS[row] + TWOS[i]), more));
        }
    }
}

/* Products of 6 tiles with 16 outputs, or where `halves` is 1 of 12 tiles with 8, at one position: v of a
 * phase begins at v + phase * phase_step and has rows of `row` bytes. What follows an odd number of inputs is
 * multiplied by 0. */
AVX2 static inline __attribute__((always_inline)) void products_at(const char *v, int64_t phase_step,
                                                                   const int32_t *phases, int64_t row,
                                                                   int pairs, const char *w, int32_t *m,
                                                                   const int halves) {
    const int tiles = 2 * GROUP / halves;
    __m256i sums[2 * GROUP];
    for (int s = 0; s < 2 * GROUP; s++) sums[s] = _mm256_setzero_si256();
    for (int p = 0; p < phases[0]; p++) {
        const char *from[4]; /* every third row */
        for (int t = 0; t < 4; t++) from[t] = v + phases[1 + p] * phase_step + 3 * t * row;
        for (int64_t i = 0; i < pairs; i++, w += 4 * BLOCK) {
            const __m256i w0 = _mm256_loadu_si256((const __m256i *)w),
                          w1 = _mm256_loadu_si256((const __m256i *)w + (halves > 1));
            _mm_prefetch(w + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 12
            for (int t = 0; t < tiles; t++) {
                const __m256i pair = _mm256_set1_epi32(four_bytes(from[t / 3] + t % 3 * row + 4 * i));
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pair, w0));
                if (halves > 1)
                    sums[GROUP + t] = _mm256_add_epi32(sums[GROUP + t], _mm256_madd_epi16(pair, w1));
            }
        }
    }
    for (int t = 0; t < tiles; t++)
        for (int h = 0; h < halves; h++)
            _mm256_storeu_si256((__m256i *)(m + t * BLOCK) + h, sums[h * GROUP + t]);
}

/* The same of `tiles` tiles with 16 outputs. */
VNNI static inline __attribute__((always_inline)) void products_vnni(const char *v, int64_t phase_step,
                                                                     const int32_t *phases, int64_t row,
                                                                     int pairs, const char *w, int32_t *m,
                                                                     const int tiles) {
    __m512i sums[MAX_TILES];
    for (int t = 0; t < tiles; t++) sums[t] = _mm512_setzero_si512();
    for (int p = 0; p < phases[0]; p++) {
        const char *from[MAX_TILES / 3]; /* every third row */
        for (int t = 0; t < tiles / 3; t++) from[t] = v + phases[1 + p] * phase_step + 3 * t * row;
        for (int64_t i = 0; i < pairs; i++, w += 4 * BLOCK) {
            const __m512i weights = _mm512_loadu_si512(w);
            _mm_prefetch(w + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 24
            for (int t = 0; t < tiles; t++)
                sums[t] = _mm512_dpwssd_epi32(
                    sums[t], weights, _mm512_set1_epi32(four_bytes(from[t / 3] + t % 3 * row + 4 * i)));
        }
    }
    for (int t = 0; t < tiles; t++) _mm512_storeu_si512(m + t * BLOCK, sums[t]);
}

/* of `tiles` tiles, a multiple of 6; outputs: of the block */
typedef void PositionProducts(const char *v, int64_t phase_step, const int32_t *phases, int64_t row,
                              int pairs, const char *w, int32_t *m, int tiles, int outputs);

AVX2 static void position_products(const char *v, int64_t phase_step, const int32_t *phases, int64_t row,
                                   int pairs, const char *w, int32_t *m, int tiles, int outputs) {
    int t = 0;
    if (outputs <= BLOCK / 2)
        for (; t + 2 * GROUP <= tiles; t += 2 * GROUP)
            products_at(v + t * row, phase_step, phases, row, pairs, w, m + t * BLOCK, 1);
    for (; t < tiles; t += GROUP)
        products_at(v + t * row, phase_step, phases, row, pairs, w, m + t * BLOCK, 2);
}

VNNI static void position_products_vnni(const char *v, int64_t phase_step, const int32_t *phases, int64_t row,
                                        int pairs, const char *w, int32_t *m, int tiles, int outputs) {
    int t = 0;
    for (; t + 4 * GROUP <= tiles; t += 4 * GROUP)
        products_vnni(v + t * row, phase_step, phases, row, pairs, w, m + t * BLOCK, 4 * GROUP);
    for (; t + 2 * GROUP <= tiles; t += 2 * GROUP)
        products_vnni(v + t * row, phase_step, phases, row, pairs, w, m + t * BLOCK, 2 * GROUP);
    for (; t < tiles; t += GROUP)
        products_vnni(v + t * row, phase_step, phases, row, pairs, w, m + t * BLOCK, GROUP);
}

typedef struct {
    int64_t image;
    int i, j;
} TilePosition; /* of its first output in an output phase */

/* where the inputs of a tile begin, (6, 6), in one phase; whether all lie inside the image */
static inline int find_inputs(const Winograd *job, const TilePosition *tile, int phase, const char **from) {
    const int s = job->stride, top = (tile->i + job->first_y) * s + phase / s,
              left = (tile->j + job->first_x) * s + phase % s;
    const int64_t pixel = job->inputs * 2, line = job->width * pixel;
    const char *first = job->x + tile->image * job->height * line + top * line + left * pixel;
    const int inside =
        top >= 0 && top + (SIDE - 1) * s < job->height && left >= 0 && left + (SIDE - 1) * s < job->width;
    for (int a = 0; a < SIDE; a++)
        for (int b = 0; b < SIDE; b++) {
            const int y = top + a * s, x = left + b * s;
            const int there = inside || (y >= 0 && y < job->height && x >= 0 && x < job->width);
            from[a * SIDE + b] = there ? first + a * s * line + b * s * pixel : job->padding;
        }
    return inside;
}

/* whether the inputs of all phases are transformed at once, side by side in one row of 16 */
static int side_by_side(const Winograd *job) {
    return job->stride * job->stride * job->inputs <= 16;
}

/* v: (position, phase, tile, row), or where phases are side by side (position, tile, row) */
AVX2 static void transform_inputs(const Winograd *job, const TilePosition *positions, int tiles,
                                  int max_tiles, int16_t *v, int64_t row) {
    const int phases = job->stride * job->stride, inputs = job->inputs, together = side_by_side(job);
    const int64_t step = (together ? 1 : phases) * max_tiles * row;
    const char *from[POSITIONS];
    int16_t few[POSITIONS][32];
    memset(few, 0, sizeof few);
    for (int t = 0; t < tiles; t++)
        for (int phase = 0; phase < phases; phase++) {
            int16_t *to = v + ((int64_t)(together ? 0 : phase) * max_tiles + t) * row;
            const int inside = find_inputs(job, positions + t, phase, from);
            if (inputs < 16) {
                const int start = together ? phase * inputs : 0;
                if (inside) /* of 16 numbers those behind a phase's are written over by the next one's, or
                               have no weights */
                    for (int i = 0; i < POSITIONS; i++)
                        _mm256_storeu_si256((__m256i *)(few[i] + start),
                                            _mm256_loadu_si256((const __m256i *)from[i]));
                else
                    for (int i = 0; i < POSITIONS; i++)
                        for (int c = 0; c < inputs; c++) few[i][start + c] = ((const int16_t *)from[i])[c];
                if (together && phase + 1 < phases) continue;
                for (int i = 0; i < POSITIONS; i++) from[i] = (const char *)few[i];
                input_tile(from, 0, to, step);
            } else
                for (int c = 0; c < inputs; c += 16) { /* the last 16 may overlap those before */
                    const int first = c + 16 <= inputs ? c : inputs - 16;
                    input_tile(from, 2 * first, to + first, step);
                }
        }
}

/* The outputs of a block, from m (position, tile, 16), into acc (phase, row of a tile, tile, column, output),
 * whose first phase is `phase`; parts after the first are added. */
AVX2 static void transform_outputs(const Winograd *job, const int32_t *m, int block, int tiles, int max_tiles,
                                   int phase, int part, int32_t *acc) {
    const int outputs = job->outputs, first = block * BLOCK - phase * outputs;
    const int64_t step = (int64_t)max_tiles * BLOCK;
    static const int32_t none[BLOCK];
    const int32_t *bias = part == 0 ? job->bias + block * BLOCK : none;
    /* Blocks come last to first: what the last of a pixel writes beyond it, the first of the next pixel
     * writes over. */
    const int direct = outputs % BLOCK == 0 || (job->spread == 1 && outputs > BLOCK);
    const int there = job->spread * job->spread * outputs - block * BLOCK;
    int32_t results[OUT * OUT][BLOCK];
    for (int t = 0; t < tiles; t++) {
        for (int h = 0; h < (there > BLOCK / 2 ? 2 : 1); h++) {
            int32_t *to[OUT * OUT];
            for (int r = 0; r < OUT; r++)
                for (int c = 0; c < OUT; c++)
                    to[r * OUT + c] =
                        (direct ? acc + ((int64_t)(r * max_tiles + t) * OUT + c) * outputs + first
                                : results[r * OUT + c]) +
                        8 * h;
            output_tile(m + t * BLOCK + 8 * h, step, direct && part ? 0 : bias + 8 * h, to);
        }
        if (direct) continue;
        for (int o = 0;
             o < BLOCK && first + o < job->spread * job->spread *
                                          outputs;) { /* a block may end one phase and begin the next */
            const int in_phase = (first + o) / outputs, output = (first + o) % outputs;
            const int count = outputs - output < BLOCK - o ? outputs - output : BLOCK - o;
            for (int r = 0; r < OUT; r++)
                for (int c = 0; c < OUT; c++) {
                    int32_t *to =
                        acc + ((int64_t)((in_phase * OUT + r) * max_tiles + t) * OUT + c) * outputs + output;
                    const int32_t *from = results[r * OUT + c] + o;
                    if (part == 0)
                        memcpy(to, from, 4 * count);
                    else
                        for (int i = 0; i < count; i++) to[i] += from[i];
                }
            o += count;
        }
    }
}

/* The steps on the accumulators of an output phase, run by run of neighbouring pixels. */
static void steps_on_tiles(const Winograd *job, const Step *steps, int step_count, const Array *arrays,
                           const TilePosition *positions, int tiles, int max_tiles, int phase, int32_t *acc,
                           int32_t *registers, int64_t size) {
    const int spread = job->spread, a = phase / spread, b = phase % spread,
              chunk = (int)(size / job->outputs);
    const int rows = (job->all_rows - a + spread - 1) / spread,
              columns = (job->all_columns - b + spread - 1) / spread;
    for (int t = 0, end; t < tiles; t = end) {
        for (end = t + 1; end < tiles && positions[end].j; end++);
        const int first = positions[t].j,
                  many = (end - t) * OUT < columns - first ? (end - t) * OUT : columns - first;
        for (int r = 0; r < OUT && positions[t].i + r < rows; r++)
            for (int done = 0; done < many; done += chunk) {
                const int64_t line =
                    positions[t].image * job->all_rows + (int64_t)(positions[t].i + r) * spread + a;
                steps_on_tile(steps, step_count, arrays,
                              acc + ((int64_t)(r * max_tiles + t) * OUT + done) * job->outputs, registers,
                              size, line * job->all_columns + (int64_t)(first + done) * spread + b, spread,
                              many - done < chunk ? many - done : chunk, job->outputs);
            }
    }
}

static int smaller_of(int a, int b) {
    return a < b ? a : b;
}

/* As `products`. */
int winograd(const Winograd *job, const Step *steps, int step_count, const Array *arrays,
             int register_count) {
    const int in_phases = job->stride * job->stride, rows_of_phases = side_by_side(job) ? 1 : in_phases,
              out_phases = job->spread * job->spread, outputs = job->outputs;
    const int blocks = (out_phases * outputs + BLOCK - 1) / BLOCK;
    /* phases of the output that are made together: one, where each has blocks of its own */
    const int at_once = outputs % BLOCK == 0 ? 1 : out_phases;
    const int tile_rows = (job->rows + OUT - 1) / OUT, tile_columns = (job->columns + OUT - 1) / OUT;
    const int64_t tiles = (int64_t)job->batch * tile_rows * tile_columns;
    const int64_t row = job->inputs < 16 ? 16 : (job->inputs + 1) / 2 * 2;
    const int pairs = (job->inputs + 1) / 2;
    /* as many tiles as have transformed inputs of about half a megabyte, for weights are read once for all of
     * them */
    const int room = (int)(600000 / (POSITIONS * rows_of_phases * row * 2)) / GROUP * GROUP;
    const int least = HAS_VNNI ? VNNI_TILES : GROUP;
    const int max_tiles = room < least ? least : smaller_of(room, MAX_TILES);
    PositionProducts *multiply = HAS_VNNI ? position_products_vnni : position_products;
    const int64_t phase_step = 2 * (rows_of_phases == 1 ? job->inputs : max_tiles * row);
    const int64_t size = outputs < TILE_NUMBERS ? TILE_NUMBERS / outputs * outputs : outputs;
    int failed = 0;
#pragma omp parallel num_threads(job->threads)
    {
        int16_t *v = calloc((size_t)POSITIONS * rows_of_phases * max_tiles * row, 2);
        int32_t *m = malloc(sizeof(int32_t) * TOGETHER * POSITIONS * max_tiles * BLOCK);
        int32_t *acc = malloc(sizeof(int32_t) * ((int64_t)at_once * OUT * OUT * max_tiles * outputs + BLOCK));
        int32_t *registers = malloc(sizeof(int32_t) * size * register_count);
        if (!v || !m || !acc || !registers) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < tiles; begin += max_tiles) {
            if (failed) continue;
            const int many = tiles - begin < max_tiles ? (int)(tiles - begin) : max_tiles;
            TilePosition positions[MAX_TILES];
            for (int t = 0; t < many; t++) {
                const int64_t tile = begin + t, line = tile / tile_columns;
                positions[t] = (TilePosition){line / tile_rows, (int)(line % tile_rows) * OUT,
                                              (int)(tile % tile_columns) * OUT};
            }
            transform_inputs(job, positions, many, max_tiles, v, row);
            for (int phase = 0; phase < out_phases; phase += at_once) {
                const int last = outputs % BLOCK == 0 ? (phase + 1) * outputs / BLOCK : blocks;
                const int first = phase * outputs / BLOCK;
                for (int end = last; end > first; end -= TOGETHER) {
                    const int together = smaller_of(TOGETHER, end - first), block = end - together;
                    for (int part = 0; part < job->parts; part++) {
                        for (int position = 0; position < POSITIONS; position++)
                            for (int n = 0; n < together; n++) {
                                const int64_t entry =
                                    ((int64_t)part * blocks + block + n) * POSITIONS + position;
                                multiply(
                                    (const char *)(v + (int64_t)position * rows_of_phases * max_tiles * row),
                                    phase_step, job->phases + entry * (in_phases + 1), row * 2, pairs,
                                    job->weights + job->starts[entry],
                                    m + (int64_t)(n * POSITIONS + position) * max_tiles * BLOCK,
                                    (many + GROUP - 1) / GROUP * GROUP,
                                    out_phases * outputs - (block + n) * BLOCK);
                            }
                        for (int n = together - 1; n >= 0; n--)
                            transform_outputs(job, m + (int64_t)n * POSITIONS * max_tiles * BLOCK, block + n,
                                              many, max_tiles, phase, part, acc);
                    }
                }
                for (int p = 0; p < at_once; p++)
                    steps_on_tiles(job, steps, step_count, arrays, positions, many, max_tiles, phase + p,
                                   acc + (int64_t)p * OUT * OUT * max_tiles * outputs, registers, size);
            }
        }
        free(v);
        free(m);
        free(acc);
        free(registers);
    }
    return failed;
}

#else

int winograd(const Winograd *job, const Step *steps, int step_count, const Array *arrays,
             int register_count) {
    return 1;
}

#endif
