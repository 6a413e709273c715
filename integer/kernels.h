/* What the kernels' files share: tensors, elementwise steps, how code for a processor is marked. */

#ifndef LICQ_KERNELS_H
#define LICQ_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(LICQ_PLAIN) /* -DLICQ_PLAIN: plain C, to test it */
#define X86 1
#include <immintrin.h>
/* by features: clones by processor are chosen on the processors of that maker alone */
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#define AVX2 __attribute__((target("avx2")))
static inline int32_t four_bytes(const char *p) { int32_t v; memcpy(&v, p, 4); return v; }
#else
#define X86 0
#define CLONES
#endif

enum { S8, U8, S16, S32 };

typedef struct {
    char *data;      /* (pixels, channels), channels contiguous */
    int32_t type;
    int32_t offset;  /* a stored number is the number plus this */
} Array;

enum { LOAD, STORE, RESCALE, ADD, PRODUCT, NEG, ABS, SQUARE, CLAMP, LEAKY, TABLE, GDN, ADDC };

typedef struct {
    int32_t op, dst, a, b;  /* registers; LOAD and STORE: b is the array */
    int32_t period;         /* length of the parameter arrays, a multiple of the channels, or 1 */
    int32_t first, last;    /* TABLE: of the first entry, number of entries - 1; GDN: inverse, algorithm;
                             * STORE: side of the square of pixels that a pixel's channels are, or 0, and pixels in a row */
    int32_t quick;          /* RESCALE, LEAKY: the multiplier is nudged (`nudged` in integer/fast.py); GDN: `gdn4` has room for it */
    const double *multiplier;
    const int32_t *low, *high, *factor;
    const int32_t *table;   /* TABLE; GDN: shift */
    const float *scale;     /* GDN: mantissa * 2^-shift, or null where `gdn8` may not be used */
} Step;

#define BLOCK 16  /* outputs that a microkernel makes at a time */
#define GROUP 6   /* pixels, or tiles of pixels */
#define PIECE_NUMBERS 576 /* that all steps are done on before the next: their registers stay in the first cache */
#define TILE_NUMBERS 3072  /* that steps work on at a time: few registers of them stay in the cache next to the processor */

/* The steps on `pixels` pixels from `pixel` on, `step` apart. Register 0 is `first`; the others are `registers`, `size` numbers each. */
void steps_on_tile(const Step *steps, int count, const Array *arrays, int32_t *first, int32_t *registers, int64_t size, int64_t pixel,
                   int64_t step, int pixels, int channels);

#endif
