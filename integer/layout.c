/* What `integer/library.py` compares with its mirror of kernels.h when it loads the kernels. */

#include "kernels.h"

typedef struct {
    const char *name;
    int64_t offset, size;
} Entry;

#define STRUCTURE(type) {#type, 0, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(((type *)0)->field)}
#define NUMBER(number) {#number, number, 0}

static const Entry LAYOUT[] = {
    STRUCTURE(Array),
    FIELD(Array, data),
    FIELD(Array, type),
    FIELD(Array, offset),

    STRUCTURE(Step),
    FIELD(Step, op),
    FIELD(Step, dst),
    FIELD(Step, a),
    FIELD(Step, b),
    FIELD(Step, period),
    FIELD(Step, rescale),
    FIELD(Step, rescale.multiplier),
    FIELD(Step, rescale.low),
    FIELD(Step, rescale.high),
    FIELD(Step, rescale.factor),
    FIELD(Step, rescale.limits_alike),
    FIELD(Step, rescale.tie_free),
    FIELD(Step, leaky),
    FIELD(Step, leaky.multiplier),
    FIELD(Step, leaky.tie_free),
    FIELD(Step, add),
    FIELD(Step, add.low),
    FIELD(Step, add.high),
    FIELD(Step, add.addend),
    FIELD(Step, clamp),
    FIELD(Step, clamp.low),
    FIELD(Step, clamp.high),
    FIELD(Step, table),
    FIELD(Step, table.entries),
    FIELD(Step, table.first),
    FIELD(Step, table.last),
    FIELD(Step, gdn),
    FIELD(Step, gdn.mantissa),
    FIELD(Step, gdn.shift),
    FIELD(Step, gdn.low),
    FIELD(Step, gdn.high),
    FIELD(Step, gdn.scale),
    FIELD(Step, gdn.inverse),
    FIELD(Step, gdn.with_root),
    FIELD(Step, gdn.fits_float64),
    FIELD(Step, store),
    FIELD(Step, store.shuffle_side),
    FIELD(Step, store.row_pixels),

    STRUCTURE(Product),
    FIELD(Product, x),
    FIELD(Product, weights),
    FIELD(Product, bias),
    FIELD(Product, padding),
    FIELD(Product, taps),
    FIELD(Product, type),
    FIELD(Product, batch),
    FIELD(Product, height),
    FIELD(Product, width),
    FIELD(Product, inputs),
    FIELD(Product, count),
    FIELD(Product, rows),
    FIELD(Product, columns),
    FIELD(Product, stride_rows),
    FIELD(Product, stride_columns),
    FIELD(Product, outputs),
    FIELD(Product, spread),
    FIELD(Product, first_row),
    FIELD(Product, first_column),
    FIELD(Product, all_columns),
    FIELD(Product, all_rows),
    FIELD(Product, threads),

    STRUCTURE(Winograd),
    FIELD(Winograd, x),
    FIELD(Winograd, weights),
    FIELD(Winograd, bias),
    FIELD(Winograd, padding),
    FIELD(Winograd, starts),
    FIELD(Winograd, phases),
    FIELD(Winograd, batch),
    FIELD(Winograd, height),
    FIELD(Winograd, width),
    FIELD(Winograd, inputs),
    FIELD(Winograd, stride),
    FIELD(Winograd, first_y),
    FIELD(Winograd, first_x),
    FIELD(Winograd, rows),
    FIELD(Winograd, columns),
    FIELD(Winograd, outputs),
    FIELD(Winograd, spread),
    FIELD(Winograd, all_columns),
    FIELD(Winograd, all_rows),
    FIELD(Winograd, parts),
    FIELD(Winograd, threads),

    STRUCTURE(LayerNorm),
    FIELD(LayerNorm, x),
    FIELD(LayerNorm, eps),
    FIELD(LayerNorm, multiplier),
    FIELD(LayerNorm, sign),
    FIELD(LayerNorm, offset),
    FIELD(LayerNorm, low),
    FIELD(LayerNorm, high),
    FIELD(LayerNorm, rows),
    FIELD(LayerNorm, eps_ceiling),
    FIELD(LayerNorm, count),
    FIELD(LayerNorm, threads),
    FIELD(LayerNorm, out),

    STRUCTURE(Attention),
    FIELD(Attention, q),
    FIELD(Attention, k),
    FIELD(Attention, v),
    FIELD(Attention, score_scale),
    FIELD(Attention, weight_scale),
    FIELD(Attention, offset),
    FIELD(Attention, blank),
    FIELD(Attention, kind),
    FIELD(Attention, table),
    FIELD(Attention, batch),
    FIELD(Attention, q_steps),
    FIELD(Attention, k_steps),
    FIELD(Attention, v_steps),
    FIELD(Attention, heads),
    FIELD(Attention, queries),
    FIELD(Attention, keys),
    FIELD(Attention, inner),
    FIELD(Attention, width),
    FIELD(Attention, last),
    FIELD(Attention, score_low),
    FIELD(Attention, score_high),
    FIELD(Attention, weight_low),
    FIELD(Attention, weight_high),
    FIELD(Attention, threads),
    FIELD(Attention, tie_free),
    FIELD(Attention, out),

    STRUCTURE(Rows),
    FIELD(Rows, cdfs),
    FIELD(Rows, starts),
    FIELD(Rows, offsets),
    FIELD(Rows, count),
    FIELD(Rows, length),

    STRUCTURE(Mixture),
    FIELD(Mixture, scales),
    FIELD(Mixture, means),
    FIELD(Mixture, weights),
    FIELD(Mixture, thresholds),
    FIELD(Mixture, inverses),
    FIELD(Mixture, reach),
    FIELD(Mixture, normal),
    FIELD(Mixture, levels),
    FIELD(Mixture, boundary_bits),
    FIELD(Mixture, components),
    FIELD(Mixture, max_bins),

    STRUCTURE(RansDecoder),
    FIELD(RansDecoder, words),
    FIELD(RansDecoder, count),
    FIELD(RansDecoder, next),
    FIELD(RansDecoder, state),

    NUMBER(S8),
    NUMBER(U8),
    NUMBER(S16),
    NUMBER(S32),
    NUMBER(LOAD),
    NUMBER(STORE),
    NUMBER(RESCALE),
    NUMBER(ADD),
    NUMBER(ADD_CHANNELS),
    NUMBER(MULTIPLY),
    NUMBER(NEG),
    NUMBER(ABS),
    NUMBER(SQUARE),
    NUMBER(CLAMP),
    NUMBER(LEAKY),
    NUMBER(TABLE),
    NUMBER(GDN),
    NUMBER(BLOCK),
};

/* Name of entry `index`, null behind the last: a structure, a field (its offset and size in bytes), or a
 * constant (its value in place of an offset). */
const char *layout_entry(int index, int64_t *offset, int64_t *size) {
    if (index < 0 || index >= (int)(sizeof LAYOUT / sizeof *LAYOUT)) return NULL;
    *offset = LAYOUT[index].offset;
    *size = LAYOUT[index].size;
    return LAYOUT[index].name;
}

/* Whether direct products run on 8-bit instructions here: then inputs that 8 bits hold are best stored as
 * U8, else as S16. Winograd's products need S16; `beats_bytes` in integer/winograd.py says where they win. */
int has_vnni(void) {
    return HAS_VNNI;
}

/* whether `winograd` runs here */
int has_winograd(void) {
    return HAS_AVX2 != 0;
}
