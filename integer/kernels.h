/* What the kernels' files share: tensors, elementwise steps, how code for a processor is marked. */

#ifndef LICQ_KERNELS_H
#define LICQ_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(LICQ_PLAIN) /* -DLICQ_PLAIN: plain C, to test it */
#define X86 1
#include <immintrin.h>
/* by features: clones by processor are chosen on the processors of that maker alone */
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#define AVX2 __attribute__((target("avx2")))
static inline int32_t four_bytes(const char *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}
#else
#define X86 0
#define CLONES
#endif

enum { S8, U8, S16, S32 };

typedef struct {
    char *data; /* (pixels, channels), channels contiguous */
    int32_t type;
    int32_t offset; /* a stored number is the number plus this */
} Array;

enum { LOAD, STORE, RESCALE, ADD, PRODUCT, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN, ADDC };

/* One elementwise operation on registers. Parameters of channels are arrays of `period` numbers. */
typedef struct {
    int32_t op, dst, a, b; /* registers; LOAD and STORE: b is the array */
    int32_t period;        /* a multiple of the channels, or 1 */
    union {
        struct {
            int32_t same_limits; /* for all channels */
            int32_t tie_free; /* the multiplier is one of `tie_free_multiplier` in integer/multipliers.py */
        } rescale;
        struct {
            int32_t tie_free;
        } leaky;
        struct {
            int32_t first, last; /* input of the first entry, number of entries - 1 */
        } table;
        struct {
            int32_t inverse, root; /* root: of the norm, as GDN has it and GDN1 has not */
            int32_t vectors;       /* `gdn4` has room for the numbers */
        } gdn;
        struct {
            int32_t side,
                width; /* side of the square of pixels that a pixel's channels are, or 0; pixels in a row */
        } store;
    };
    const double *multiplier;
    const int32_t *low, *high, *factor;
    const int32_t *entries;  /* TABLE */
    const int32_t *constant; /* ADDC */
    const int32_t *shift;    /* GDN */
    const float *scale;      /* GDN: mantissa * 2^-shift, or null where `gdn8` may not be used */
} Step;

/* What a caller must know of a structure to fill it in: a name, and the offset of the field or the size of
 * the structure. */
typedef struct {
    const char *name;
    int64_t value;
} Layout;
#define LAYOUT_SIZE(type) {#type, sizeof(type)}
#define LAYOUT_FIELD(type, field) {#type "." #field, offsetof(type, field)}

/* Products by taps. */
typedef struct {
    const char *x;       /* (batch, height, width, inputs) */
    const char *weights; /* see `pack` in integer/products.py */
    const int32_t *bias; /* of whole blocks of outputs, corrections for offsets of x included */
    const char *padding; /* what stands outside the image: `inputs` numbers */
    const int32_t
        *taps;    /* (count, 2): row and column that a tap reads, from (row * stride, column * stride) on */
    int32_t type; /* of x: U8 or S16 */
    int32_t batch, height, width, inputs;
    int32_t count;         /* of taps */
    int32_t rows, columns; /* of outputs, before they are spread */
    int32_t stride_rows, stride_columns;
    int32_t outputs;
    int32_t spread, first_row, first_column; /* output (i, j) stands at row i * spread + first_row ... */
    int32_t all_columns, all_rows;           /* of the spread output */
    int32_t threads;
} Product;

/* Products by Winograd's F(4x4, 3x3). */
typedef struct {
    const char *x;         /* (batch, height, width, inputs), int16 */
    const char *weights;   /* transformed, see `winograd_weights` in integer/winograd.py */
    const int32_t *bias;   /* of whole blocks of virtual outputs: (out_phase, output) */
    const char *padding;   /* what stands outside the image: `inputs` numbers */
    const int64_t *starts; /* (parts, blocks, 36): first byte of the weights of a block at a position */
    const int32_t *phases; /* (parts, blocks, 36, in_phases + 1): how many phases of the input have weights
                              there, and which */
    int32_t batch, height, width, inputs;
    int32_t stride;           /* of the convolution; in_phases is its square */
    int32_t first_y, first_x; /* place of the window's first tap in an input phase, relative to the output */
    int32_t rows, columns;    /* of an output phase, the largest */
    int32_t outputs, spread;  /* out_phases is the square of spread */
    int32_t all_columns, all_rows;
    int32_t parts; /* in which the phases of the input are summed, so that no sum of one exceeds 2^25 */
    int32_t threads;
} Winograd;

typedef struct {
    const int16_t *x;         /* (rows, count) */
    const double *eps;        /* C^2 eps_q shifted by 2k, for k = 0..26 */
    const double *multiplier; /* (count,), magnitude of the gain */
    const double *sign, *offset, *low, *high;
    int64_t rows;
    double eps_ceiling; /* ceil(C^2 eps_q) */
    int32_t count, threads;
    Array out;
} LayerNorm;

typedef struct {
    const int16_t *q, *k,
        *v; /* (batch, heads, queries, inner), (batch, heads, keys, inner), (batch, heads, keys, width) */
    const double *score_scale;  /* (heads,), to steps of 1/256 nat */
    const double *weight_scale; /* (heads,), from probabilities to what multiplies v */
    const int32_t *offset;      /* (kinds, heads, queries, keys) or null */
    const uint8_t *blank;       /* (kinds, heads, queries): rows without a key; or null */
    const int32_t *kind;        /* (batch,), or null: kind 0 */
    const float *table;         /* 2^12 exp(-i / 256) */
    int64_t batch;
    int64_t q_steps[3], k_steps[3], v_steps[3]; /* of batch, head and row, in numbers */
    int32_t heads, queries, keys, inner, width, last, score_low, score_high, weight_low, weight_high, threads;
    int32_t tie_free; /* both scales are */
    Array out;        /* (batch, heads, queries, width) */
} Attention;

#define BLOCK 16 /* outputs that a microkernel makes at a time */
#define GROUP 6  /* pixels, or tiles of pixels */
#define PIECE_NUMBERS                                                                                        \
    576 /* that all steps are done on before the next: their registers stay in the first cache */
#define TILE_NUMBERS                                                                                         \
    3072 /* that steps work on at a time: few registers of them stay in the cache next to the processor */

/* The steps on `pixels` pixels from `pixel` on, `step` apart. Register 0 is `first`; the others are
 * `registers`, `size` numbers each. */
void steps_on_tile(const Step *steps, int count, const Array *arrays, int32_t *first, int32_t *registers,
                   int64_t size, int64_t pixel, int64_t step, int pixels, int channels);

/* Store `pixels` pixels of channels from `pixel` on, `step` apart. */
void store(const int32_t *x, const Array *array, int64_t pixel, int64_t step, int pixels, int channels);

#endif
