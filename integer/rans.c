/* Entropy coding: rANS with 64 bits of state and words of 32 bits, frequencies of 16 bits, and escapes in
 * digits of 4 bits. Streams are those of CompressAI's coder to the byte (`compressai.ans`; Duda, "Asymmetric
 * numeral systems", arXiv:1311.2540; F. Giesen's rans64.h).
 *
 * Nothing is read or written outside of the arrays that are given, whatever a stream or an argument holds. */

#include <string.h>

#include "kernels.h"

#define LOWEST ((uint64_t)1 << 31) /* of the state */
#define ONE (1 << 16)
enum {
    DIGIT_BITS = 4,
    MAX_DIGITS = 8,
    NORMAL_BITS = 30,
    INVERSE_BITS = 20,
    STEP_BITS = 8,
    LAST = 8 << STEP_BITS
};

/* -------------------------------------------------------------------------------------------------------
 * rows */

/* the number of the first row that is no distribution of at least two bins; -1: all are */
int64_t rans_bad_row(const Rows *rows) {
    for (int64_t row = 0; row < rows->count; row++) {
        int64_t start = rows->starts[row], end = rows->starts[row + 1];
        if (start < 0 || end > rows->length || end - start < 3 || end - start > ONE + 1) return row;
        const int32_t *cdf = rows->cdfs + start;
        int64_t last = end - start - 1;
        if (cdf[0] || cdf[last] != ONE) return row;
        for (int64_t i = 0; i < last; i++)
            if (cdf[i] >= cdf[i + 1]) return row;
    }
    return -1;
}

/* the number of the last of n ascending numbers that is at most x; the first is */
static inline int64_t last_at_most(const int32_t *numbers, int64_t n, int32_t x) {
    int64_t low = 0;
    while (n > 1) {
        int64_t half = n / 2;
        low = numbers[low + half] <= x ? low + half : low;
        n -= half;
    }
    return low;
}

/* ---------------------------------------------------------------------------------------------------
 * mixtures */

/* 2^30 Phi(d 2^-(20 + bits)) by linear interpolation in the table: `phi` of codec/tables.py */
static inline int64_t phi(const Mixture *m, int64_t d, int bits) {
    uint64_t size = d < 0 ? -(uint64_t)d : (uint64_t)d;
    int fine = INVERSE_BITS + bits - STEP_BITS, kept = fine < 24 ? fine : 24;
    uint64_t entry = size >> fine;
    if (entry >= LAST) return d < 0 ? ((int64_t)1 << NORMAL_BITS) - m->normal[LAST] : m->normal[LAST];
    int64_t below = m->normal[entry], above = m->normal[entry + 1];
    int64_t rest = (int64_t)((size & (((uint64_t)1 << fine) - 1)) >> (fine - kept));
    int64_t value = below + (((above - below) * rest) >> kept);
    return d < 0 ? ((int64_t)1 << NORMAL_BITS) - value : value;
}

enum { COMPONENTS = 16 }; /* at most */

/* the distribution of one symbol: `frequencies` of a mixture in codec/tables.py */
typedef struct {
    const Mixture *tables;
    int64_t lowest, bins, total, first;
    int64_t mean[COMPONENTS], inverse[COMPONENTS], weight[COMPONENTS];
} OneMixture;

static int64_t cumulative(const OneMixture *one, int64_t edge) {
    const Mixture *m = one->tables;
    int64_t sum = 0, x = (2 * (one->lowest + edge) - 1) * ((int64_t)1 << m->boundary_bits);
    for (int c = 0; c < m->components; c++)
        if (one->weight[c])
            sum += phi(m, (x - 2 * one->mean[c]) * one->inverse[c], m->boundary_bits + 1) * one->weight[c];
    int64_t quotient = sum / one->total;
    return quotient - (sum % one->total < 0);
}

/* entry `bin` of the symbol's row */
static int64_t frequency(const OneMixture *one, int64_t bin) {
    if (bin > one->bins) return ONE;
    return bin + (((cumulative(one, bin) - one->first) * (ONE - one->bins - 1)) >> NORMAL_BITS);
}

static void mixture_of(OneMixture *one, const Mixture *m, int64_t i, int64_t n) {
    int64_t lowest = INT64_MAX, highest = INT64_MIN, total = 0;
    one->tables = m;
    for (int c = 0; c < m->components; c++) {
        int64_t scale = m->scales[c * n + i], mean = m->means[c * n + i], weight = m->weights[c * n + i];
        int low = 0, high = m->levels - 1; /* thresholds that are at most the scale */
        while (low < high) {
            int middle = (low + high) / 2;
            if (m->thresholds[middle] <= scale)
                low = middle + 1;
            else
                high = middle;
        }
        one->mean[c] = mean, one->inverse[c] = m->inverses[low], one->weight[c] = weight;
        total += weight;
        int64_t floor = mean >> m->boundary_bits, reach = m->reach[low];
        if (weight > 0 && floor - reach < lowest) lowest = floor - reach;
        if (weight > 0 && floor + reach + 1 > highest) highest = floor + reach + 1;
    }
    if (total <= 0) lowest = highest = 0;
    one->lowest = lowest;
    one->bins = highest - lowest + 1 < m->max_bins ? highest - lowest + 1 : m->max_bins;
    one->total = total > 1 ? total : 1;
    one->first = 0;
    one->first = cumulative(one, 0);
}

/* ---------------------------------------------------------------------------------------------------
 * encoding */

/* An entry is start << 16 | frequency of a bin, or digit << 16. Writes those of one symbol, at most 10, whose
 * bin is `value`; the bin `last` is for all other integers. Returns their number; 0: the symbol is too far
 * away. */
static inline int escape(uint32_t *entries, int64_t value, int64_t last) {
    uint64_t raw = value < 0 ? -2 * (uint64_t)value - 1 : 2 * (uint64_t)(value - last);
    int count = 0, digits = 0;
    if (raw >> (DIGIT_BITS * MAX_DIGITS - 1)) return 0;
    while (raw >> (DIGIT_BITS * digits)) digits++;
    entries[count++] = (uint32_t)digits << 16;
    for (int j = 0; j < digits; j++) entries[count++] = (uint32_t)(raw >> (DIGIT_BITS * j) & 15) << 16;
    return count;
}

/* The entries of n symbols, 10 each at most. chosen: the row of each; base: is subtracted from each, or null.
 * Returns the number of entries, or -1 - i where symbol i has no row or is too far away. */
int64_t rans_entries(const Rows *rows, const int32_t *symbols, const int32_t *chosen, const int32_t *base,
                     int64_t n, uint32_t *entries) {
    uint32_t *next = entries;
    for (int64_t i = 0; i < n; i++) {
        int64_t row = chosen[i];
        if (row < 0 || row >= rows->count) return -1 - i;
        const int32_t *cdf = rows->cdfs + rows->starts[row];
        int64_t last = rows->starts[row + 1] - rows->starts[row] - 2;
        int64_t value = (int64_t)symbols[i] - (base ? base[i] : 0) - rows->offsets[row];
        int is_escape = value < 0 || value >= last;
        int64_t bin = is_escape ? last : value;
        *next++ = (uint32_t)cdf[bin] << 16 | (uint32_t)(cdf[bin + 1] - cdf[bin]);
        if (is_escape) {
            int count = escape(next, value, last);
            if (!count) return -1 - i;
            next += count;
        }
    }
    return next - entries;
}

/* The same for symbols with a mixture each. */
int64_t rans_mixture_entries(const Mixture *m, const int32_t *symbols, int64_t n, uint32_t *entries) {
    uint32_t *next = entries;
    if (m->components > COMPONENTS) return -1;
    for (int64_t i = 0; i < n; i++) {
        OneMixture one;
        mixture_of(&one, m, i, n);
        int64_t value = symbols[i] - one.lowest, last = one.bins;
        int is_escape = value < 0 || value >= last;
        int64_t bin = is_escape ? last : value, start = frequency(&one, bin);
        *next++ = (uint32_t)start << 16 | (uint32_t)(frequency(&one, bin + 1) - start);
        if (is_escape) {
            int count = escape(next, value, last);
            if (!count) return -1 - i;
            next += count;
        }
    }
    return next - entries;
}

/* The stream of n entries, from the end of `words`, (n + 2,), forwards. Returns its first word; -1: an entry
 * with neither a frequency nor a digit. */
int64_t rans_stream(const uint32_t *entries, int64_t n, uint32_t *words) {
    uint64_t x = LOWEST;
    int64_t first = n + 2;
    for (int64_t i = n - 1; i >= 0; i--) {
        uint64_t start = entries[i] >> 16, frequency = entries[i] & 0xffff;
        int bits = frequency ? 16 : DIGIT_BITS;
        if (!frequency && start > 15) return -1;
        if (!frequency) frequency = 1 << (16 - DIGIT_BITS);
        if (x >= (LOWEST >> 16 << 32) * frequency) {
            words[--first] = (uint32_t)x;
            x >>= 32;
        }
        if (bits == 16)
            x = ((x / frequency) << 16) + x % frequency + start;
        else
            x = x << DIGIT_BITS | start;
    }
    words[--first] = (uint32_t)(x >> 32);
    words[--first] = (uint32_t)x;
    return first;
}

/* ---------------------------------------------------------------------------------------------------
 * decoding */

static inline int refill(RansDecoder *d) {
    if (d->state >= LOWEST) return 1;
    if (d->next >= d->count) return 0;
    uint32_t word;
    memcpy(&word, d->words + 4 * d->next++, 4);
    d->state = d->state << 32 | word;
    return 1;
}

static inline int advance(RansDecoder *d, uint64_t start, uint64_t frequency) {
    d->state = frequency * (d->state >> 16) + (d->state & 0xffff) - start;
    return refill(d);
}

static inline int digit(RansDecoder *d) {
    int value = d->state & 15;
    d->state >>= DIGIT_BITS;
    return refill(d) ? value : -1;
}

/* the integer of an escape, relative to the first bin; 0: the stream is damaged */
static int escaped(RansDecoder *d, int64_t last, int64_t *value) {
    int count = digit(d);
    if (count < 0 || count > MAX_DIGITS) return 0;
    uint64_t raw = 0;
    for (int j = 0; j < count; j++) {
        int next = digit(d);
        if (next < 0) return 0;
        raw |= (uint64_t)next << (DIGIT_BITS * j);
    }
    *value = raw & 1 ? -(int64_t)(raw >> 1) - 1 : (int64_t)(raw >> 1) + last;
    return 1;
}

/* Reads the state; 0: the stream is too short. */
int rans_begin(RansDecoder *d) {
    if (d->count < 2) return 0;
    memcpy(&d->state, d->words, 8);
    d->next = 2;
    return d->state >= LOWEST;
}

/* whether the stream is at its end */
int rans_ended(const RansDecoder *d) {
    return d->next == d->count && d->state == LOWEST;
}

/* n symbols. Returns n, or -1 - i where the stream holds no symbol i. */
int64_t rans_symbols(RansDecoder *d, const Rows *rows, const int32_t *chosen, const int32_t *base, int64_t n,
                     int32_t *symbols) {
    for (int64_t i = 0; i < n; i++) {
        int64_t row = chosen[i];
        if (row < 0 || row >= rows->count) return -1 - i;
        const int32_t *cdf = rows->cdfs + rows->starts[row];
        int64_t bins = rows->starts[row + 1] - rows->starts[row] - 1;
        int64_t value = last_at_most(cdf, bins, (int32_t)(d->state & 0xffff));
        if (!advance(d, cdf[value], cdf[value + 1] - cdf[value])) return -1 - i;
        if (value == bins - 1 && !escaped(d, bins - 1, &value)) return -1 - i;
        value += (int64_t)rows->offsets[row] + (base ? base[i] : 0);
        if (value != (int32_t)value) return -1 - i;
        symbols[i] = (int32_t)value;
    }
    return n;
}

/* The same for symbols with a mixture each. */
int64_t rans_mixture_symbols(RansDecoder *d, const Mixture *m, int64_t n, int32_t *symbols) {
    if (m->components > COMPONENTS) return -1;
    for (int64_t i = 0; i < n; i++) {
        OneMixture one;
        mixture_of(&one, m, i, n);
        int64_t wanted = d->state & 0xffff, low = 0, high = one.bins + 1, start = 0, end = ONE;
        while (high - low > 1) { /* frequency(low) <= wanted < frequency(high) */
            int64_t middle = (low + high) / 2, here = frequency(&one, middle);
            if (here <= wanted)
                low = middle, start = here;
            else
                high = middle, end = here;
        }
        int64_t value = low;
        if (!advance(d, start, end - start)) return -1 - i;
        if (value == one.bins && !escaped(d, one.bins, &value)) return -1 - i;
        value += one.lowest;
        if (value != (int32_t)value) return -1 - i;
        symbols[i] = (int32_t)value;
    }
    return n;
}
