// Attention of one decode row over pages where they lie, for one KV head and the query heads that share it.
//
// This file is compiled once for each instruction set; KERNEL is the name that its function then has. A page is
// read once: codes become floats in registers, are multiplied with all query heads there, and are gone. What
// pages need before that (unpacked codes, factors as floats) is put into a scratch that the first cache holds.
#include "kernel.h"

#include <math.h>
#include <string.h>
#if defined __x86_64__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX2__
#define LANES 8
#else
#define LANES 4
#endif
#define MOST_LANES 16 // of which a head_dim is a multiple
#define TOGETHER (LANES < MOST_LANES ? 2 : 1) // blocks of channels whose weighted values are summed at once
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float lanes_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t uint_lanes __attribute__((vector_size(4 * LANES)));
typedef int8_t byte_lanes __attribute__((vector_size(LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t quad_picks __attribute__((vector_size(16)));

// SHUFFLE(PICKS, a, b, i, ...) is {ab[i], ...}, where ab is a and then b; PICKS is a vector of such indices.
#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE(PICKS, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(PICKS, a, b, ...) __builtin_shuffle(a, b, (PICKS){__VA_ARGS__})
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const float *from) { return *(const lanes_anywhere *)from; }
INLINE void store(float *to, lanes x) { *(lanes_anywhere *)to = x; }
INLINE lanes fill(float x) { return x - (lanes){}; }

INLINE lanes choose(int_lanes where, lanes a, lanes b) {
    return (lanes)((where & (int_lanes)a) | (~where & (int_lanes)b));
}

// With intrinsics, since compilers make a dozen instructions of the general form.
INLINE lanes from_bytes(const int8_t *codes) {
#if defined __AVX512F__
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#elif defined __AVX2__
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
#else
    byte_lanes bytes;
    memcpy(&bytes, codes, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, int_lanes), lanes);
#endif
}

INLINE lanes from_bfloat16(const uint16_t *halves) {
    half_lanes narrow;
    memcpy(&narrow, halves, sizeof narrow);
    return (lanes)(__builtin_convertvector(narrow, uint_lanes) << 16);
}

INLINE float bfloat16_at(const uint16_t *half) {
    uint32_t word = (uint32_t)*half << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

INLINE quad halved(lanes x) {
    quad parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
    quad sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return sum;
}

INLINE float sum_of(lanes x) {
    quad sum = halved(x);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The sums of four.
INLINE quad sums_of(const lanes x[4]) {
    quad a = halved(x[0]), b = halved(x[1]), c = halved(x[2]), d = halved(x[3]);
    quad ab = SHUFFLE(quad_picks, a, b, 0, 4, 1, 5) + SHUFFLE(quad_picks, a, b, 2, 6, 3, 7);
    quad cd = SHUFFLE(quad_picks, c, d, 0, 4, 1, 5) + SHUFFLE(quad_picks, c, d, 2, 6, 3, 7);
    return SHUFFLE(quad_picks, ab, cd, 0, 1, 4, 5) + SHUFFLE(quad_picks, ab, cd, 2, 3, 6, 7);
}

// e^x for x <= 0, and NaN for NaN; 0 below -87. Cody and Waite's reduction, and the
// polynomial of the Cephes library, as tables of elementary functions give them.
INLINE lanes exp_lanes(lanes x) {
    int_lanes is_small = x < -87.0f;
    lanes scaled = x * 1.44269504088896341f;
    lanes rounded = (scaled + 0x1.8p23f) - 0x1.8p23f;
    lanes r = x - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    lanes p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    lanes power = p * r * r + r + 1.0f;
    int_lanes exponent = __builtin_convertvector(choose(is_small, fill(0), rounded), int_lanes) << 23;
    lanes result = choose(is_small, fill(0), (lanes)((int_lanes)power + exponent));
    return choose(x != x, x, result);
}

// How elements become floats; a constant wherever it is passed.
enum Source {
    OF_FLOATS,
    OF_BFLOAT16,
    OF_CODES,    // as they are
    OF_GROUPS,   // with the factor and the addend of the slot's group of channels
    OF_CHANNELS, // with those of the channel, which the slots share
};

// The visible slots of a page as the loops read them.
struct Slots {
    const uint8_t *elements; // of the first slot
    int64_t slot_bytes;
    const uint8_t *next; // the page that comes after this one
    int next_bytes;      // that are fetched at a time; 0 for none
    const float *factors, *addends; // [slots, groups], or [groups] where slot_stride is 0; the value of a code is
    int slot_stride, group_size;    // code * factor + addend
    int scaled_after;               // scores and weights are multiplied with factors, which are one for a slot
};

// Fetches a part of the next page, so that few lines are on their way at any time.
INLINE void prefetch(const struct Slots *slots, int part) {
    const uint8_t *from = slots->next + (int64_t)part * slots->next_bytes;
    for (int byte = 0; byte < slots->next_bytes; byte += 64) __builtin_prefetch(from + byte);
}

INLINE lanes element_lanes(enum Source source, const struct Slots *slots, int slot, int block) {
    const uint8_t *at = slots->elements + slot * slots->slot_bytes;
    int channel = block * LANES;
    if (source == OF_FLOATS) return load((const float *)at + channel);
    if (source == OF_BFLOAT16) return from_bfloat16((const uint16_t *)at + channel);
    lanes codes = from_bytes((const int8_t *)at + channel);
    if (source == OF_CODES) return codes;
    if (source == OF_CHANNELS) return codes * load(slots->factors + channel) + load(slots->addends + channel);
    int group = slot * slots->slot_stride + channel / slots->group_size;
    return codes * slots->factors[group] + slots->addends[group];
}

// Sets scores[q][slot] for `heads` query heads and `together` slots.
INLINE void score_together(enum Source source, int heads, int together, const struct Slots *slots, int first,
                           int blocks, const float *query, float *scores, int64_t score_stride) {
    lanes sums[2][4] = {};
    for (int block = 0; block < blocks; block++) {
        lanes k[2];
        for (int i = 0; i < together; i++) k[i] = element_lanes(source, slots, first + i, block);
        for (int q = 0; q < heads; q++) {
            lanes of_query = load(query + ((int64_t)q * blocks + block) * LANES);
            for (int i = 0; i < together; i++) sums[i][q] += k[i] * of_query;
        }
    }
    for (int i = 0; i < together; i++) {
        quad of_heads = sums_of(sums[i]);
        for (int q = 0; q < heads; q++) scores[q * score_stride + first + i] = of_heads[q];
    }
}

// Sets scores[q][slot] for `heads` query heads, and slots from the first to `count`: two at once, whose sums
// do not wait for each other.
INLINE void score_slots(enum Source source, int heads, const struct Slots *slots, int count, int blocks,
                        const float *query, float *scores, int64_t score_stride) {
    int slot = 0;
    for (; slot + 2 <= count; slot += 2) {
        prefetch(slots, slot / 2);
        score_together(source, heads, 2, slots, slot, blocks, query, scores, score_stride);
    }
    if (slot < count) score_together(source, heads, 1, slots, slot, blocks, query, scores, score_stride);
}

// Adds weights[q][slot] times the slots to acc[q].
INLINE void add_slots(enum Source source, int heads, const struct Slots *slots, int count, int blocks,
                      const float *weights, int64_t weight_stride, float *acc) {
    int64_t head_dim = (int64_t)blocks * LANES;
    for (int block = 0; block < blocks; block += TOGETHER) {
        prefetch(slots, block / TOGETHER);
        float *at = acc + block * LANES;
        lanes sums[4][2];
        for (int q = 0; q < heads; q++)
            for (int i = 0; i < TOGETHER; i++) sums[q][i] = load(at + q * head_dim + i * LANES);
        for (int slot = 0; slot < count; slot++) {
            lanes v[2];
            for (int i = 0; i < TOGETHER; i++) v[i] = element_lanes(source, slots, slot, block + i);
            for (int q = 0; q < heads; q++) {
                lanes weight = fill(weights[q * weight_stride + slot]);
                for (int i = 0; i < TOGETHER; i++) sums[q][i] += v[i] * weight;
            }
        }
        for (int q = 0; q < heads; q++)
            for (int i = 0; i < TOGETHER; i++) store(at + q * head_dim + i * LANES, sums[q][i]);
    }
}

// Calls FUNCTION for the query heads in chunks of four, two and one, with a constant source and a constant chunk.
#define CHUNK_CASES(FUNCTION, SOURCE, ...)                                                                             \
    case SOURCE * 8 + 4: FUNCTION(SOURCE, 4, __VA_ARGS__); break;                                                      \
    case SOURCE * 8 + 2: FUNCTION(SOURCE, 2, __VA_ARGS__); break;                                                      \
    case SOURCE * 8 + 1: FUNCTION(SOURCE, 1, __VA_ARGS__); break;
#define WITH_CONSTANTS(FUNCTION, source, heads, ...)                                                                   \
    switch (source * 8 + heads) {                                                                                      \
        CHUNK_CASES(FUNCTION, OF_FLOATS, __VA_ARGS__)                                                                  \
        CHUNK_CASES(FUNCTION, OF_BFLOAT16, __VA_ARGS__)                                                                \
        CHUNK_CASES(FUNCTION, OF_CODES, __VA_ARGS__)                                                                   \
        CHUNK_CASES(FUNCTION, OF_GROUPS, __VA_ARGS__)                                                                  \
        CHUNK_CASES(FUNCTION, OF_CHANNELS, __VA_ARGS__)                                                                \
    }

INLINE int chunk_of(int heads_left) { return heads_left >= 4 ? 4 : heads_left >= 2 ? 2 : 1; }

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t pairs __attribute__((vector_size(16)));

INLINE bytes fill_bytes(uint8_t x) { return x - (bytes){}; }

INLINE bytes first_of_each(bytes a, bytes b) {
    return SHUFFLE(bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

INLINE bytes last_of_each(bytes a, bytes b) {
    return SHUFFLE(bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

INLINE void store_pairs(bytes ab, bytes cd, uint8_t *to) {
    pairs first = SHUFFLE(pairs, (pairs)ab, (pairs)cd, 0, 8, 1, 9, 2, 10, 3, 11);
    pairs last = SHUFFLE(pairs, (pairs)ab, (pairs)cd, 4, 12, 5, 13, 6, 14, 7, 15);
    memcpy(to, &first, sizeof first);
    memcpy(to + sizeof first, &last, sizeof last);
}

// Stores the elements of two, or of four, in turns.
INLINE void store_in_turns(int count, const bytes *of, uint8_t *to) {
    bytes first = first_of_each(of[0], of[1]), last = last_of_each(of[0], of[1]);
    if (count == 2) {
        memcpy(to, &first, sizeof first);
        memcpy(to + sizeof first, &last, sizeof last);
        return;
    }
    store_pairs(first, first_of_each(of[2], of[3]), to);
    store_pairs(last, last_of_each(of[2], of[3]), to + 2 * sizeof first);
}

// map[code] of each code, all below 16.
INLINE bytes mapped(bytes map, bytes codes) {
#if defined __AVX2__
    return (bytes)_mm_shuffle_epi8((__m128i)map, (__m128i)codes);
#elif defined __aarch64__
    return (bytes)vqtbl1q_u8((uint8x16_t)map, (uint8x16_t)codes);
#else
    bytes result;
    for (int i = 0; i < 16; i++) result[i] = map[codes[i]];
    return result;
#endif
}

// Code number j of each byte, of low bits in the low plane and of high bits, already shifted down, in the high one.
INLINE bytes codes_at(int low_bits, int high_bits, int j, bytes low, bytes high) {
    bytes codes = low >> low_bits * j & fill_bytes((1 << low_bits) - 1);
    if (high_bits) codes |= (high >> high_bits * j & fill_bytes((1 << high_bits) - 1)) << low_bits;
    return codes;
}

// How packed codes of a pool become bytes.
struct Signs {
    int bit;          // of the sign; 0 for none
    const bytes *map; // NULL for none
};

// Unpacks `count` bytes of the low plane, as if they were 16.
INLINE void unpack_bytes(int low_bits, int high_bits, int count, const uint8_t *low_plane, const uint8_t *high_plane,
                         int high_shift, struct Signs signs, uint8_t *codes) {
    bytes low = {}, high = {}, at[4];
    memcpy(&low, low_plane, count);
    if (high_bits) memcpy(&high, high_plane, count);
    for (int j = 0; j < 8 / low_bits; j++) {
        at[j] = codes_at(low_bits, high_bits, j, low, high >> high_shift);
        if (low_bits + high_bits <= 4 && signs.map) at[j] = mapped(*signs.map, at[j]);
        else at[j] = (at[j] ^ fill_bytes(signs.bit)) - fill_bytes(signs.bit);
    }
    store_in_turns(8 / low_bits, at, codes);
}

INLINE void unpack_slot(int low_bits, int high_bits, const uint8_t *packed, int count, struct Signs signs,
                        uint8_t *codes) {
    int per_byte = 8 / low_bits, low_bytes = count / per_byte;
    int run = high_bits ? low_bytes * high_bits / low_bits : low_bytes; // bytes of the high plane
    const uint8_t *high_plane = packed + low_bytes;
    for (int first = 0; first < low_bytes; first += run) {
        int high_shift = first / run * per_byte * high_bits;
        for (int i = 0; i < run; i += 16) {
            uint8_t *to = codes + (first + i) * per_byte;
            if (run - i >= 16) {
                unpack_bytes(low_bits, high_bits, 16, packed + first + i, high_plane + i, high_shift, signs, to);
                continue;
            }
            uint8_t padded[64];
            unpack_bytes(low_bits, high_bits, run - i, packed + first + i, high_plane + i, high_shift, signs, padded);
            memcpy(to, padded, (run - i) * per_byte);
        }
    }
}

// Codes of fewer than 8 bits, several to a byte, the first in the lowest bits; those of 3, 5 and 6 bits in two
// planes: byte i of the high plane goes with bytes i, i + run, ... of the low one.
static void unpack(int bits, const uint8_t *packed, int count, struct Signs signs, uint8_t *codes) {
    switch (bits) {
    case 2: unpack_slot(2, 0, packed, count, signs, codes); break;
    case 3: unpack_slot(2, 1, packed, count, signs, codes); break;
    case 4: unpack_slot(4, 0, packed, count, signs, codes); break;
    case 5: unpack_slot(4, 1, packed, count, signs, codes); break;
    case 6: unpack_slot(4, 2, packed, count, signs, codes); break;
    }
}

INLINE int element_bits(const struct PoolLayout *layout) {
    return layout->element == FLOAT32 ? 32 : layout->element == BFLOAT16 ? 16 : layout->bits;
}

// Some slots of one page of one KV head.
struct Range {
    int64_t kv_head, page;
    int first, count;
};

// Reads the numbers of a range's slots, or the one row of numbers that they share; returns the row's stride.
static int read_numbers(const struct Blocks *blocks, const void *numbers, const float *values,
                        const struct Range *range, float *to) {
    int64_t first = range->kv_head * blocks->head_stride + range->page * blocks->page_stride +
                    range->first * blocks->slot_stride;
    int count = blocks->slot_stride ? range->count * blocks->groups : blocks->groups;
    const uint16_t *halves = (const uint16_t *)numbers + first;
    switch (blocks->number) {
    case NUMBER_FLOAT32: memcpy(to, (const float *)numbers + first, count * sizeof *to); break;
    case NUMBER_BFLOAT16: for (int i = 0; i < count; i++) to[i] = bfloat16_at(halves + i); break;
    case NUMBER_LOW_HALF: for (int i = 0; i < count; i++) to[i] = bfloat16_at(halves + first + 2 * i); break;
    case NUMBER_HIGH_HALF: for (int i = 0; i < count; i++) to[i] = bfloat16_at(halves + first + 2 * i + 1); break;
    case NUMBER_BYTE: for (int i = 0; i < count; i++) to[i] = values[((const uint8_t *)numbers)[first + i]]; break;
    case NUMBER_WORD: for (int i = 0; i < count; i++) to[i] = values[halves[i]]; break;
    }
    return blocks->slot_stride ? blocks->groups : 0;
}

// Sets factors and addends, [slots, groups] or [groups]; returns the stride of slots.
static int read_scales(const struct Pool *pool, const struct Range *range, float *factors, float *addends) {
    const struct PoolLayout *layout = pool->layout;
    if (!layout->scales.number) {
        factors[0] = layout->step, addends[0] = layout->start;
        return 0;
    }
    int stride = read_numbers(&layout->scales, pool->scales, pool->factor_values, range, factors);
    int slots = stride ? range->count : 1, groups = layout->scales.groups;
    if (layout->global_scales.number) {
        const float *globals = addends; // for now
        int global_stride =
            read_numbers(&layout->global_scales, pool->global_scales, pool->global_values, range, addends);
        for (int slot = 0; slot < slots; slot++)
            for (int group = 0; group < groups; group++)
                factors[slot * groups + group] *= globals[slot * global_stride];
    }
    if (layout->offsets.number) read_numbers(&layout->offsets, pool->scales, pool->offset_values, range, addends);
    else memset(addends, 0, sizeof *addends * slots * groups);
    for (int i = 0; i < slots * groups; i++) {
        addends[i] += layout->start * factors[i];
        factors[i] *= layout->step;
    }
    return stride;
}

// A scratch for one page, of keys or of values.
struct Scratch {
    void *elements;           // [page_size, head_dim] floats, or as many codes
    float *factors, *addends; // [page_size, head_dim]
};

// Sets what codes stand for, in units of their scale.
static void look_up(const struct PoolLayout *layout, const float *code_values, const uint8_t *codes, int count,
                    float *floats) {
    if (layout->element == TABLE_CODES)
        for (int i = count - 1; i >= 0; i--) floats[i] = code_values[codes[i]];
    else
        for (int i = count - 1; i >= 0; i--) floats[i] = (int8_t)codes[i];
}

static void scale_floats(const struct Slots *slots, int count, int head_dim, float *floats) {
    for (int slot = 0; slot < count; slot++) {
        const float *factors = slots->factors + slot * slots->slot_stride;
        const float *addends = slots->addends + slot * slots->slot_stride;
        for (int channel = 0; channel < head_dim; channel += slots->group_size, factors++, addends++)
            for (int i = 0; i < slots->group_size; i++, floats++) *floats = *floats * *factors + *addends;
    }
}

// Makes the slots of a page ready for the loops, and returns how these read them.
static enum Source prepare(const struct Call *call, const struct Pool *pool, const struct Range *range,
                           struct Scratch *scratch, struct Slots *slots) {
    const struct PoolLayout *layout = pool->layout;
    int head_dim = call->layout.head_dim, count = range->count;
    int bits = element_bits(layout);
    int64_t slot_bytes = (int64_t)head_dim * bits / 8;
    int64_t first = (range->kv_head * call->layout.num_pages + range->page) * call->layout.page_size + range->first;
    const uint8_t *elements = pool->elements + first * slot_bytes;
    *slots = (struct Slots){.elements = elements, .slot_bytes = slot_bytes, .group_size = 1};
    slots->factors = scratch->factors, slots->addends = scratch->addends;
    if (layout->element == FLOAT32) return OF_FLOATS;
    if (layout->element == BFLOAT16) return OF_BFLOAT16;

    if (bits < 8) {
        uint8_t *codes = scratch->elements;
        bytes map;
        memcpy(&map, layout->map, sizeof map);
        struct Signs signs = {layout->sign_bit, layout->has_map ? &map : NULL};
        for (int slot = 0; slot < count; slot++)
            unpack(bits, elements + slot * slot_bytes, head_dim, signs, codes + (int64_t)slot * head_dim);
        slots->elements = codes;
        slots->slot_bytes = head_dim;
    }
    slots->slot_stride = read_scales(pool, range, scratch->factors, scratch->addends);
    slots->group_size = head_dim / layout->scales.groups;
    slots->scaled_after = slots->group_size == head_dim;
    if (layout->element == EVEN_CODES) {
        if (slots->scaled_after) return OF_CODES;
        if (slots->group_size % LANES == 0) return OF_GROUPS;
        if (slots->group_size == 1 && slots->slot_stride == 0) return OF_CHANNELS;
    }
    // Anything else becomes floats here, from the last one on, since their codes may lie in the same scratch.
    float *floats = scratch->elements;
    for (int slot = count - 1; slot >= 0; slot--)
        look_up(layout, pool->code_values, slots->elements + slot * slots->slot_bytes, head_dim,
                floats + (int64_t)slot * head_dim);
    slots->elements = (const uint8_t *)floats;
    slots->slot_bytes = (int64_t)head_dim * 4;
    if (!slots->scaled_after) scale_floats(slots, count, head_dim, floats);
    return OF_FLOATS;
}

INLINE int64_t score_stride_of(const struct Call *call) {
    return (call->layout.page_size + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
}

INLINE int64_t page_bytes_of(const struct Call *call, const struct Pool *pool) {
    return (int64_t)call->layout.page_size * call->layout.head_dim * element_bits(pool->layout) / 8;
}

INLINE int number_bytes(int32_t number) {
    if (number == NUMBER_BYTE) return 1;
    return number == NUMBER_BFLOAT16 || number == NUMBER_WORD ? 2 : 4;
}

INLINE void prefetch_numbers(const struct Blocks *blocks, const void *numbers, int kv_head, int page, int page_size) {
    if (!blocks->number) return;
    int64_t first = kv_head * blocks->head_stride + page * blocks->page_stride;
    int size = number_bytes(blocks->number), count = blocks->slot_stride ? page_size * blocks->groups : blocks->groups;
    const uint8_t *from = (const uint8_t *)numbers + size * first;
    for (int byte = 0; byte < size * count; byte += 64) __builtin_prefetch(from + byte);
}

// Has the loops fetch the next page in so many parts; a last one may lie behind the page, where it does no harm.
INLINE void plan_prefetch(const struct Call *call, const struct Pool *pool, const struct Piece *piece, int page,
                          int parts, struct Slots *slots) {
    int32_t next = page < 0 || page >= call->layout.num_pages ? 0 : page;
    int64_t bytes = page_bytes_of(call, pool);
    slots->next = pool->elements + (piece->kv_head * (int64_t)call->layout.num_pages + next) * bytes;
    slots->next_bytes = (bytes / parts + 63) / 64 * 64;
    prefetch_numbers(&pool->layout->scales, pool->scales, piece->kv_head, next, call->layout.page_size);
    prefetch_numbers(&pool->layout->global_scales, pool->global_scales, piece->kv_head, next, call->layout.page_size);
}

// Turns a page's scores [LANES multiple] into weights, and returns by what the sums so far are to be multiplied.
static float weigh(float soft_cap, float *scores, int count, float *highest, float *sum) {
    int padded = (count + LANES - 1) / LANES * LANES;
    for (int slot = count; slot < padded; slot++) scores[slot] = -INFINITY;
    if (soft_cap) {
        for (int slot = 0; slot < count; slot += LANES) {
            lanes x = load(scores + slot) / soft_cap;
            lanes shrunk = exp_lanes(choose(x < 0, x, -x) * 2);
            lanes capped = (1 - shrunk) / (1 + shrunk) * soft_cap;
            store(scores + slot, choose(x < 0, -capped, capped));
        }
        for (int slot = count; slot < padded; slot++) scores[slot] = -INFINITY;
    }
    lanes highest_lanes = fill(*highest);
    for (int slot = 0; slot < count; slot += LANES) {
        lanes x = load(scores + slot);
        highest_lanes = choose(x > highest_lanes, x, highest_lanes); // which a NaN never is
    }
    float new_highest = *highest;
    for (int i = 0; i < LANES; i++) new_highest = highest_lanes[i] > new_highest ? highest_lanes[i] : new_highest;
    lanes total = {};
    for (int slot = 0; slot < count; slot += LANES) {
        lanes weights = exp_lanes(load(scores + slot) - new_highest);
        store(scores + slot, weights);
        total += weights;
    }
    float shrink = exp_lanes(fill(*highest - new_highest))[0];
    *sum = *sum * shrink + sum_of(total);
    *highest = new_highest;
    return shrink;
}

// Turns the dot products of a query with codes into those with what the codes stand for.
static void scale_scores(const struct Slots *slots, int count, float query_sum, float *scores) {
    for (int slot = 0; slot < count; slot++) {
        int at = slot * slots->slot_stride;
        scores[slot] = scores[slot] * slots->factors[at] + slots->addends[at] * query_sum;
    }
}

// Turns the weights of values into those of their codes, and returns what each channel gets besides.
static float scale_weights(const struct Slots *slots, int count, float *weights) {
    float sum = 0;
    for (int slot = 0; slot < count; slot++) {
        int at = slot * slots->slot_stride;
        sum += weights[slot] * slots->addends[at];
        weights[slot] *= slots->factors[at];
    }
    return sum;
}

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

void PASTE(attend_piece_, KERNEL)(const struct Call *call, const struct Piece *piece, struct State state,
                                  float *memory) {
    const struct CallLayout *layout = &call->layout;
    int heads = layout->q_heads / layout->kv_heads, head_dim = layout->head_dim, blocks = head_dim / LANES;
    int64_t first_head = (int64_t)piece->row * layout->q_heads + (int64_t)piece->kv_head * heads;
    const float *query = call->query + first_head * head_dim;
    const int32_t *table = call->table + (int64_t)piece->row * layout->table_pages;
    struct Scratch scratch = {.elements = memory};
    int64_t elements = (int64_t)layout->page_size * head_dim, score_stride = score_stride_of(call);
    scratch.factors = memory += elements;
    scratch.addends = memory += elements;
    float *scores = memory += elements;                     // [heads, score_stride]
    float *query_sums = memory += heads * score_stride;     // [heads], over the channels
    float *acc_addends = memory += heads;                   // [heads], what all channels of acc get besides

    for (int q = 0; q < heads; q++) {
        state.highest[q] = MASK_VALUE, state.sum[q] = 0, acc_addends[q] = 0, query_sums[q] = 0;
        for (int channel = 0; channel < head_dim; channel++) query_sums[q] += query[(int64_t)q * head_dim + channel];
    }
    memset(state.acc, 0, sizeof(float) * heads * head_dim);
    for (int page = piece->first_page; page < piece->end_page; page++) {
        int32_t next = page + 1 < piece->end_page ? table[page + 1] : 0;
        if (table[page] < 0 || table[page] >= layout->num_pages) continue;
        int64_t first_slot = (int64_t)page * layout->page_size, past = piece->end_slot - first_slot;
        int first = piece->first_slot > first_slot ? piece->first_slot - first_slot : 0;
        int end = past < layout->page_size ? past : layout->page_size;
        struct Range range = {piece->kv_head, table[page], first, end - first};
        struct Slots slots;
        enum Source source = prepare(call, &call->keys, &range, &scratch, &slots);
        plan_prefetch(call, &call->keys, piece, next, (range.count + 1) / 2, &slots);
        for (int q = 0, chunk; q < heads; q += chunk) {
            chunk = chunk_of(heads - q);
            WITH_CONSTANTS(score_slots, source, chunk, &slots, range.count, blocks, query + (int64_t)q * head_dim,
                           scores + q * score_stride, score_stride)
            slots.next_bytes = 0;
        }
        if (slots.scaled_after)
            for (int q = 0; q < heads; q++)
                scale_scores(&slots, range.count, query_sums[q], scores + q * score_stride);
        for (int q = 0; q < heads; q++) {
            float *weights = scores + q * score_stride;
            float shrink = weigh(layout->soft_cap, weights, range.count, &state.highest[q], &state.sum[q]);
            if (shrink == 1) continue;
            float *acc = state.acc + (int64_t)q * head_dim;
            for (int block = 0; block < blocks; block++) store(acc + block * LANES, load(acc + block * LANES) * shrink);
            acc_addends[q] *= shrink;
        }
        source = prepare(call, &call->values, &range, &scratch, &slots);
        plan_prefetch(call, &call->values, piece, next, blocks / TOGETHER, &slots);
        if (slots.scaled_after)
            for (int q = 0; q < heads; q++)
                acc_addends[q] += scale_weights(&slots, range.count, scores + q * score_stride);
        for (int q = 0, chunk; q < heads; q += chunk) {
            chunk = chunk_of(heads - q);
            WITH_CONSTANTS(add_slots, source, chunk, &slots, range.count, blocks, scores + q * score_stride,
                           score_stride, state.acc + (int64_t)q * head_dim)
            slots.next_bytes = 0;
        }
    }
    for (int q = 0; q < heads; q++)
        for (int channel = 0; channel < head_dim; channel++)
            state.acc[(int64_t)q * head_dim + channel] += acc_addends[q];
}

#ifdef IS_BASELINE
int64_t scratch_floats(const struct Call *call) {
    int64_t heads = call->layout.q_heads / call->layout.kv_heads;
    return 3 * (int64_t)call->layout.page_size * call->layout.head_dim + heads * (score_stride_of(call) + 2);
}
#endif
