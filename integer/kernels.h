/* Integer kernels for the CPU: products into int32 accumulators, and what happens to a tile of accumulators
 * while it is in the cache. Plain C called through ctypes; no Python header is needed to build it.
 *
 * Every result equals `integer/reference.py` to the bit on every machine. Sums of products are int32
 * arithmetic without saturation, and the program proves their ranges. Each floating-point operation is exact
 * or a correctly rounded IEEE one (compiled without contraction and without reassociation).
 *
 * This header has the structures that Python fills in. `integer/library.py` mirrors them, and layout.c states
 * their sizes and offsets so that a mirror that differs is noticed.
 */

#ifndef LICQ_KERNELS_H
#define LICQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Instruction sets. The processor decides at run time; a build can leave the newer ones out, for tests:
 * -DLICQ_ISA=0 plain C, 1 up to AVX2, 2 up to AVX-512 without VNNI. */
#ifndef LICQ_ISA
#define LICQ_ISA 3
#endif
#if defined(__x86_64__) && defined(__GNUC__) && LICQ_ISA > 0
#define X86 1
#include <immintrin.h>
/* by features: clones by processor are chosen on the processors of that maker alone */
#if LICQ_ISA > 1
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define CLONES __attribute__((target_clones("avx2", "default")))
#endif
#define AVX2 __attribute__((target("avx2")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#define HAS_AVX512                                                                                           \
    (LICQ_ISA > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&              \
     __builtin_cpu_supports("avx512vl"))
#define HAS_VNNI (LICQ_ISA > 2 && HAS_AVX512 && __builtin_cpu_supports("avx512vnni"))
#else
#define X86 0
#define CLONES
#define HAS_AVX2 0
#define HAS_AVX512 0
#define HAS_VNNI 0
#endif

enum { S8, U8, S16, S32 };

typedef struct {
    char *data;     /* (pixels, channels), channels contiguous */
    int32_t type;   /* S8 .. S32 */
    int32_t offset; /* a stored number is the number plus this */
} Array;

enum { LOAD, STORE, RESCALE, ADD, ADD_CHANNELS, MULTIPLY, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN };

/* One elementwise operation on registers. `op` says which struct of the union holds its parameters; MULTIPLY,
 * NEG, ABS, SQUARE and LOAD have none. */
typedef struct {
    int32_t op;
    int32_t dst, a, b; /* registers; LOAD and STORE: b is the number of the array */
    int32_t period; /* length of the parameter arrays: a multiple of the channels, or 1 for one number for all
                       channels */
    union {
        struct {
            const double *multiplier;
            const int32_t *low, *high;
            const int32_t *factor; /* that the clipped result is multiplied by, or null */
            int32_t limits_alike;  /* low and high are the same for all channels */
            int32_t tie_free; /* multipliers are those of `tie_free_multiplier` in integer/exactness.py */
        } rescale;
        struct {
            const double *multiplier; /* one, for negative numbers */
            int32_t tie_free;         /* it is one of `tie_free_multiplier`, between 0 and 1 */
        } leaky;
        struct {
            const int32_t *low, *high; /* (1,) */
            const int32_t *addend;     /* ADD_CHANNELS: (period,); ADD: null */
        } add;
        struct {
            const int32_t *low, *high;
        } clamp;
        struct {
            const int32_t *entries;
            int32_t first; /* the number whose entry is entries[0] */
            int32_t last;  /* number of entries - 1 */
        } table;
        struct {
            const double *mantissa;
            const int32_t *shift, *low, *high;
            const float *scale;   /* mantissa * 2^-shift, or null where `gdn8` may not be used */
            int32_t inverse;      /* IGDN: multiplies by the norm */
            int32_t with_root;    /* of the norm; 0: the norm itself (GDN1) */
            int32_t fits_float64; /* `gdn4` may be used */
        } gdn;
        struct {
            int32_t shuffle_side; /* of the square of pixels that a pixel's channels become; 0: no pixel
                                     shuffle */
            int32_t row_pixels;   /* pixels in a row of the image, before a shuffle */
        } store;
    };
} Step;

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

typedef struct {
    const char *x;         /* (batch, height, width, inputs), int16 */
    const char *weights;   /* transformed, see `winograd_weights` in integer/winograd.py */
    const int32_t *bias;   /* of whole blocks of virtual outputs: (out_phase, output) */
    const char *padding;   /* what stands outside the image: `inputs` numbers */
    const int64_t *starts; /* (parts, blocks, 36): first byte of the weights of a block at a position */
    const int32_t *phases; /* (parts, blocks, 36, in_phases + 1): how many phases of the input have weights
                              there; which */
    int32_t batch, height, width, inputs;
    int32_t stride; /* of the convolution; in_phases is its square */
    int32_t first_y,
        first_x;           /* position of the window's first tap in an input phase, relative to the output */
    int32_t rows, columns; /* of an output phase, the largest */
    int32_t outputs, spread; /* out_phases is the square of spread */
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
    const int16_t *q;           /* (batch, heads, queries, inner) */
    const int16_t *k;           /* (batch, heads, keys, inner) */
    const int16_t *v;           /* (batch, heads, keys, width) */
    const double *score_scale;  /* (heads,), to steps of 1/256 nat */
    const double *weight_scale; /* (heads,), from probabilities to what multiplies v */
    const int32_t *offset;      /* (kinds, heads, queries, keys) or null */
    const uint8_t *blank;       /* (kinds, heads, queries): rows without a key; or null */
    const int32_t *kind;        /* (batch,), or null: kind 0 */
    const float *table;         /* 2^12 exp(-i / 256) */
    int64_t batch;
    int64_t q_steps[3], k_steps[3], v_steps[3]; /* of batch, head and row, in numbers */
    int32_t heads, queries, keys, inner, width;
    int32_t last; /* number of entries of the table - 1 */
    int32_t score_low, score_high, weight_low, weight_high;
    int32_t threads;
    int32_t tie_free; /* both scales are of `tie_free_multiplier` */
    Array out;        /* (batch, heads, queries, width) */
} Attention;

/* Distributions of integers, one row after the other. */
typedef struct {
    const int32_t *cdfs;    /* cumulative frequencies of a row's bins: from 0 to 2^16 */
    const int64_t *starts;  /* (count + 1,), where each row begins */
    const int32_t *offsets; /* (count,), the integer of a row's first bin; the last bin is for all others */
    int64_t count, length;  /* of the rows, and of cdfs */
} Rows;

/* Mixtures of Gaussians, one for each symbol; see `MixtureRows` in codec/tables.py. */
typedef struct {
    const int32_t *scales, *means, *weights; /* (components, symbols) */
    const int64_t *thresholds;               /* (levels - 1,) */
    const int64_t *inverses, *reach;         /* (levels,) */
    const int64_t *normal;
    int32_t levels, boundary_bits, components, max_bins;
} Mixture;

typedef struct {
    const char *words;   /* of the stream, 4 bytes each */
    int64_t count, next; /* words, and which is read next */
    uint64_t state;
} RansDecoder;

enum {
    BLOCK = 16, /* outputs that a microkernel makes at a time */
    GROUP = 6,  /* pixels, or tiles of pixels, that it makes at a time */
    PIECE_NUMBERS =
        576, /* that all steps are done on before the next: their registers stay in the first cache */
    TILE_NUMBERS = 3072, /* that steps work on at a time: few registers of them stay in the cache next to the
                            processor */
};

/* The steps on `pixels` pixels from `pixel` on, `step` apart. Register 0 is `first`; the others are
 * `registers`, `size` numbers each. */
void steps_on_tile(const Step *steps, int count, const Array *arrays, int32_t *first, int32_t *registers,
                   int64_t size, int64_t pixel, int64_t step, int pixels, int channels);

/* x as the numbers of `pixels` pixels of an array, from `pixel` on, `step` apart. */
void store_pixels(const int32_t *x, const Array *array, int64_t pixel, int64_t step, int pixels,
                  int channels);

void gdn(int32_t *out, const int32_t *x, const int32_t *norm, int n, const Step *s);

#endif
