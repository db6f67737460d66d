// Attention of one decode row over pages where they lie, for one KV head and the query heads that share it.
//
// This file is compiled once for each instruction set; KERNEL is the name that its function then has. A page is
// read once: codes become floats in registers, are multiplied with all query heads there, and are gone. What
// pages need before that (unpacked codes, factors as floats) is put into a scratch that the first cache holds.
// Pages are worked through in tiles, so that the softmax, which has little to do for a page, has enough at once.
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
#define TILE 128      // slots that are weighed at once, where pages are not longer
#if defined __AVX512F__ || defined __aarch64__
#define ACCUMULATORS 16 // that registers hold, beside what is added to them
#else
#define ACCUMULATORS 8
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float lanes_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t uint_lanes __attribute__((vector_size(4 * LANES)));
typedef int8_t byte_lanes __attribute__((vector_size(LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef uint16_t words __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));

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

INLINE quad folded(lanes x) {
    quad parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
    quad sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return sum;
}

INLINE float sum_of(lanes x) {
    quad sum = folded(x);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Of each four lanes, those of a and b in turns: the first two of each, or the last two.
#if defined __AVX512F__
INLINE lanes first_in_turns(lanes a, lanes b) { return _mm512_unpacklo_ps(a, b); }
INLINE lanes last_in_turns(lanes a, lanes b) { return _mm512_unpackhi_ps(a, b); }
#elif defined __AVX2__
INLINE lanes first_in_turns(lanes a, lanes b) { return _mm256_unpacklo_ps(a, b); }
INLINE lanes last_in_turns(lanes a, lanes b) { return _mm256_unpackhi_ps(a, b); }
#else
INLINE lanes first_in_turns(lanes a, lanes b) { return SHUFFLE(int_lanes, a, b, 0, 4, 1, 5); }
INLINE lanes last_in_turns(lanes a, lanes b) { return SHUFFLE(int_lanes, a, b, 2, 6, 3, 7); }
#endif

INLINE lanes add_in_turns(lanes a, lanes b) { return first_in_turns(a, b) + last_in_turns(a, b); }

// The sums of four.
INLINE quad sums_of(const lanes x[4]) {
    return folded(add_in_turns(add_in_turns(x[0], x[2]), add_in_turns(x[1], x[3])));
}

// The highest of x and a number; a NaN never is.
INLINE float highest_of(lanes x, float highest) {
    for (int i = 0; i < LANES; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
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
    lanes sums[4][4] = {}; // [heads, together]
    for (int block = 0; block < blocks; block++) {
        lanes k[4];
        for (int i = 0; i < together; i++) k[i] = element_lanes(source, slots, first + i, block);
        for (int q = 0; q < heads; q++) {
            lanes of_query = load(query + ((int64_t)q * blocks + block) * LANES);
            for (int i = 0; i < together; i++) sums[q][i] += k[i] * of_query;
        }
    }
    if (together == 4) {
        for (int q = 0; q < heads; q++) {
            quad of_slots = sums_of(sums[q]);
            memcpy(scores + q * score_stride + first, &of_slots, sizeof of_slots);
        }
        return;
    }
    for (int i = 0; i < together; i++) {
        quad of_heads = sums_of((lanes[4]){sums[0][i], sums[1][i], sums[2][i], sums[3][i]});
        for (int q = 0; q < heads; q++) scores[q * score_stride + first + i] = of_heads[q];
    }
}

// Slots, or blocks of channels, whose sums do not wait for each other and stay in registers.
INLINE int together_with(int heads) { return heads == 4 ? ACCUMULATORS / 4 : 4; }

// Sets scores[q][slot] for `heads` query heads and `count` slots.
INLINE void score_slots(enum Source source, int heads, const struct Slots *slots, int count, int blocks,
                        const float *query, float *scores, int64_t score_stride) {
    int together = together_with(heads), slot = 0;
    for (; slot + together <= count; slot += together) {
        prefetch(slots, slot / together);
        score_together(source, heads, together, slots, slot, blocks, query, scores, score_stride);
    }
    for (; slot < count; slot++) score_together(source, heads, 1, slots, slot, blocks, query, scores, score_stride);
}

// Adds weights[q][slot] times the slots to acc[q], for some blocks of channels.
INLINE void add_together(enum Source source, int heads, int together, const struct Slots *slots, int count,
                         int block, int blocks, const float *weights, int64_t weight_stride, float *acc) {
    int64_t head_dim = (int64_t)blocks * LANES;
    float *at = acc + block * LANES;
    lanes sums[4][4];
    for (int q = 0; q < heads; q++)
        for (int i = 0; i < together; i++) sums[q][i] = load(at + q * head_dim + i * LANES);
    for (int slot = 0; slot < count; slot++) {
        lanes v[4];
        for (int i = 0; i < together; i++) v[i] = element_lanes(source, slots, slot, block + i);
        for (int q = 0; q < heads; q++) {
            lanes weight = fill(weights[q * weight_stride + slot]);
            for (int i = 0; i < together; i++) sums[q][i] += v[i] * weight;
        }
    }
    for (int q = 0; q < heads; q++)
        for (int i = 0; i < together; i++) store(at + q * head_dim + i * LANES, sums[q][i]);
}

INLINE void add_slots(enum Source source, int heads, const struct Slots *slots, int count, int blocks,
                      const float *weights, int64_t weight_stride, float *acc) {
    int together = together_with(heads), block = 0;
    for (; block + together <= blocks; block += together) {
        prefetch(slots, block / together);
        add_together(source, heads, together, slots, count, block, blocks, weights, weight_stride, acc);
    }
    for (; block < blocks; block++)
        add_together(source, heads, 1, slots, count, block, blocks, weights, weight_stride, acc);
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

INLINE bytes fill_bytes(uint8_t x) { return x - (bytes){}; }

// map[code] of each code, all below 16; the map is repeated for each 16 bytes.
INLINE bytes mapped(bytes map, bytes codes) {
#if defined __AVX512F__
    return (bytes)_mm512_shuffle_epi8((__m512i)map, (__m512i)codes);
#elif defined __AVX2__
    return (bytes)_mm256_shuffle_epi8((__m256i)map, (__m256i)codes);
#elif defined __aarch64__
    return (bytes)vqtbl1q_u8((uint8x16_t)map, (uint8x16_t)codes);
#else
    bytes result;
    for (int i = 0; i < (int)sizeof result; i++) result[i] = map[codes[i]];
    return result;
#endif
}

// Bytes as words of 16 bits, and of 32: as many as fill a vector.
INLINE words words_of(const uint8_t *from) {
#if defined __AVX512F__
    return (words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
#elif defined __AVX2__
    return (words)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    typedef uint8_t half_bytes __attribute__((vector_size(2 * LANES)));
    half_bytes narrow;
    memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, words);
#endif
}

INLINE uint_lanes long_words_of(const uint8_t *from) {
#if defined __AVX512F__
    return (uint_lanes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined __AVX2__
    return (uint_lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    typedef uint8_t quarter_bytes __attribute__((vector_size(LANES)));
    quarter_bytes narrow;
    memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, uint_lanes);
#endif
}

INLINE words shifted(words x, int by) { return by < 0 ? x >> -by : x << by; }

INLINE uint_lanes shifted_long(uint_lanes x, int by) { return by < 0 ? x >> -by : x << by; }

// Spreads numbers of `bits` bits to a byte each, where they begin at bit `to`; two or four of them lie in each byte
// from bit `from` on. Each byte is first made a word as wide as its numbers are to be; then copies of the word, each
// shifted by the distance that a number has to go, are laid over each other.
INLINE bytes spread(int bits, int per_byte, const uint8_t *packed, int from, int to) {
    int apart = 8 - bits, by = to - from;
    bytes mask = fill_bytes(((1 << bits) - 1) << to);
    if (per_byte == 2) {
        words x = words_of(packed);
        return (bytes)(shifted(x, by) | shifted(x, by + apart)) & mask;
    }
    uint_lanes x = long_words_of(packed);
    x = shifted_long(x, by) | shifted_long(x, by + 2 * apart);
    return (bytes)(x | x << apart) & mask;
}

// What packed codes are in steps: mapped, or with a sign.
struct Meaning {
    int has_map;
    bytes map, sign_bit;
};

// Unpacks as many codes as fill a vector, from a low plane and from a high one, if there is one.
INLINE void unpack_bytes(int low_bits, int high_bits, struct Meaning meaning, const uint8_t *low_plane,
                         const uint8_t *high_plane, int high_from, uint8_t *to) {
    int per_byte = 8 / low_bits;
    bytes codes = spread(low_bits, per_byte, low_plane, 0, 0);
    if (high_bits) codes |= spread(high_bits, per_byte, high_plane, high_from, low_bits);
    if (low_bits + high_bits <= 4 && meaning.has_map) codes = mapped(meaning.map, codes);
    else codes = (codes ^ meaning.sign_bit) - meaning.sign_bit;
    memcpy(to, &codes, sizeof codes);
}

// The same for `count` bytes of the planes, which are fewer.
INLINE void unpack_few(int low_bits, int high_bits, struct Meaning meaning, const uint8_t *low_plane,
                       const uint8_t *high_plane, int high_from, int count, uint8_t *to) {
    uint8_t low[sizeof(bytes)] = {}, high[sizeof(bytes)] = {}, codes[sizeof(bytes)];
    memcpy(low, low_plane, count);
    if (high_bits) memcpy(high, high_plane, count);
    unpack_bytes(low_bits, high_bits, meaning, low, high, high_from, codes);
    memcpy(to, codes, count * 8 / low_bits);
}

// Unpacks a run of bytes of the low plane. A vector may hold more than the rest of it, as far as there are bytes to
// read; what it writes too much (there is room) is overwritten by what comes after.
INLINE void unpack_run(int low_bits, int high_bits, struct Meaning meaning, const uint8_t *low, const uint8_t *high,
                       int high_from, int run, const uint8_t *end, uint8_t *codes) {
    int per_byte = 8 / low_bits, step = sizeof(bytes) / per_byte;
    const uint8_t *last = high_bits ? high : low;
    int i = 0;
    for (; i < run && last + i + step <= end; i += step)
        unpack_bytes(low_bits, high_bits, meaning, low + i, high + i, high_from, codes + i * per_byte);
    if (i < run)
        unpack_few(low_bits, high_bits, meaning, low + i, high + i, high_from, run - i, codes + i * per_byte);
}

// Unpacks slots whose codes lie in two planes each: byte i of the high plane goes with bytes i, i + run, ... of the
// low one. Without a high plane, all slots are one run.
INLINE void unpack_slots(int low_bits, int high_bits, struct Meaning meaning, const uint8_t *packed, int slots,
                         int head_dim, uint8_t *codes) {
    int per_byte = 8 / low_bits, runs = high_bits ? low_bits / high_bits : 1, low_bytes = head_dim / per_byte;
    int run = low_bytes / runs, slot_bytes = low_bytes + (high_bits ? run : 0), of_run = run * per_byte;
    const uint8_t *end = packed + slots * slot_bytes;
#define UNPACK_RUN(NUMBER)                                                                                             \
    if (NUMBER < runs)                                                                                                 \
    unpack_run(low_bits, high_bits, meaning, packed + NUMBER * run, packed + low_bytes, NUMBER * per_byte * high_bits, \
               run, end, codes + NUMBER * of_run)
    for (; packed < end; packed += slot_bytes, codes += head_dim) {
        UNPACK_RUN(0);
        UNPACK_RUN(1);
        UNPACK_RUN(2);
        UNPACK_RUN(3);
    }
}

// Unpacks codes of fewer than 8 bits, several to a byte, the first in the lowest bits.
static void unpack(const struct PoolLayout *layout, const uint8_t *packed, int slots, int head_dim, uint8_t *codes) {
    struct Meaning meaning = {.has_map = layout->has_map, .sign_bit = fill_bytes(layout->sign_bit)};
    for (int i = 0; i < LANES / 4; i++) memcpy((uint8_t *)&meaning.map + 16 * i, layout->map, 16);
    switch (layout->bits) {
    case 2: unpack_slots(2, 0, meaning, packed, 1, slots * head_dim, codes); break;
    case 3: unpack_slots(2, 1, meaning, packed, slots, head_dim, codes); break;
    case 4: unpack_slots(4, 0, meaning, packed, 1, slots * head_dim, codes); break;
    case 5: unpack_slots(4, 1, meaning, packed, slots, head_dim, codes); break;
    case 6: unpack_slots(4, 2, meaning, packed, slots, head_dim, codes); break;
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

// A scratch for one page, of keys or of values, and for the scores of a tile.
struct Scratch {
    void *elements;           // [page_size, head_dim] floats, or as many codes; and MOST_LANES floats of room
    float *factors, *addends; // [page_size, head_dim], or those of the tile's slots
    float *scores;            // [heads, tile_slots]
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

// True if a slot has one factor and one addend, with which scores and weights are multiplied instead.
INLINE int is_scaled_after(const struct PoolLayout *layout) {
    return layout->element >= EVEN_CODES && layout->scales.groups <= 1;
}

// Makes the slots of a page ready for the loops, and returns how these read them.
static enum Source prepare(const struct Call *call, const struct Pool *pool, const struct Range *range,
                           const struct Scratch *scratch, struct Slots *slots) {
    const struct PoolLayout *layout = pool->layout;
    int head_dim = call->layout.head_dim, count = range->count;
    int bits = element_bits(layout);
    int64_t slot_bytes = (int64_t)head_dim * bits / 8;
    int64_t first = (range->kv_head * call->layout.num_pages + range->page) * call->layout.page_size + range->first;
    const uint8_t *elements = pool->elements + first * slot_bytes;
    *slots = (struct Slots){.elements = elements, .slot_bytes = slot_bytes, .group_size = 1};
    if (layout->element == FLOAT32) return OF_FLOATS;
    if (layout->element == BFLOAT16) return OF_BFLOAT16;

    if (bits < 8) {
        slots->elements = scratch->elements;
        slots->slot_bytes = head_dim;
        unpack(layout, elements, count, head_dim, scratch->elements);
    }
    if (!is_scaled_after(layout)) {
        slots->factors = scratch->factors, slots->addends = scratch->addends;
        slots->slot_stride = read_scales(pool, range, scratch->factors, scratch->addends);
        slots->group_size = head_dim / layout->scales.groups;
    }
    if (layout->element == EVEN_CODES) {
        if (is_scaled_after(layout)) return OF_CODES;
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
    if (!is_scaled_after(layout)) scale_floats(slots, count, head_dim, floats);
    return OF_FLOATS;
}

// The most slots of a tile, in whole lanes.
INLINE int64_t tile_slots_of(const struct Call *call) {
    int64_t slots = call->layout.page_size > TILE ? call->layout.page_size : TILE;
    return (slots + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
}

// The most factors of a page, or of a tile.
INLINE int64_t numbers_of(const struct Call *call) {
    int64_t of_page = (int64_t)call->layout.page_size * call->layout.head_dim, of_tile = tile_slots_of(call);
    return of_page > of_tile ? of_page : of_tile;
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
INLINE void plan_prefetch(const struct Call *call, const struct Pool *pool, int kv_head, int page, int parts,
                          struct Slots *slots) {
    int32_t next = page < 0 || page >= call->layout.num_pages ? 0 : page;
    int64_t bytes = page_bytes_of(call, pool);
    parts = parts > 0 ? parts : 1;
    slots->next = pool->elements + (kv_head * (int64_t)call->layout.num_pages + next) * bytes;
    slots->next_bytes = (bytes / parts + 63) / 64 * 64;
    prefetch_numbers(&pool->layout->scales, pool->scales, kv_head, next, call->layout.page_size);
    prefetch_numbers(&pool->layout->global_scales, pool->global_scales, kv_head, next, call->layout.page_size);
}

// Turns a tile's scores [tile_slots] into weights, and returns by what the sums so far are to be multiplied.
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
    float new_highest = highest_of(highest_lanes, *highest);
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
static void scale_scores(const struct Scratch *scratch, int count, float query_sum, float *scores) {
    for (int slot = 0; slot < count; slot += LANES) {
        lanes addends = load(scratch->addends + slot) * query_sum;
        store(scores + slot, load(scores + slot) * load(scratch->factors + slot) + addends);
    }
}

// Turns the weights of values into those of their codes, and returns what each channel gets besides.
static float scale_weights(const struct Scratch *scratch, int count, float *weights) {
    lanes sum = {};
    for (int slot = 0; slot < count; slot += LANES) {
        lanes of_values = load(weights + slot);
        sum += of_values * load(scratch->addends + slot);
        store(weights + slot, of_values * load(scratch->factors + slot));
    }
    return sum_of(sum);
}

// Pages that are worked through at once: their slots that the row sees, one after another.
struct Tile {
    int pages, slots;
    struct Range ranges[TILE];
    int32_t next_page; // of the pool, after these
};

// Sets the next tile of a piece, from a page on, and returns the page after it.
static int next_tile(const struct Call *call, const struct Piece *piece, int page, struct Tile *tile) {
    const struct CallLayout *layout = &call->layout;
    const int32_t *table = call->table + (int64_t)piece->row * layout->table_pages;
    int page_size = layout->page_size;
    tile->pages = tile->slots = 0;
    for (; page < piece->end_page && (!tile->pages || tile->slots + page_size <= TILE); page++) {
        if (table[page] < 0 || table[page] >= layout->num_pages) continue;
        int64_t first_slot = (int64_t)page * page_size, past = piece->end_slot - first_slot;
        int first = piece->first_slot > first_slot ? piece->first_slot - first_slot : 0;
        int end = past < page_size ? past : page_size;
        tile->ranges[tile->pages++] = (struct Range){piece->kv_head, table[page], first, end - first};
        tile->slots += end - first;
    }
    tile->next_page = page < piece->end_page ? table[page] : 0;
    return page;
}

// Reads a factor and an addend for each slot of a tile, and zeros for what the last lanes have beside them.
static void read_tile_scales(const struct Pool *pool, const struct Tile *tile, const struct Scratch *scratch) {
    int slot = 0;
    for (int page = 0; page < tile->pages; page++) {
        float *factors = scratch->factors + slot, *addends = scratch->addends + slot;
        int count = tile->ranges[page].count;
        if (!read_scales(pool, &tile->ranges[page], factors, addends))
            for (int i = 1; i < count; i++) factors[i] = factors[0], addends[i] = addends[0];
        slot += count;
    }
    for (; slot % LANES; slot++) scratch->factors[slot] = scratch->addends[slot] = 0;
}

// Sets the scores of a tile's slots.
static void score_tile(const struct Call *call, const struct Tile *tile, int heads, const float *query,
                       const float *query_sums, const struct Scratch *scratch) {
    int head_dim = call->layout.head_dim, blocks = head_dim / LANES;
    int64_t stride = tile_slots_of(call);
    float *scores = scratch->scores;
    for (int page = 0; page < tile->pages; page++) {
        const struct Range *range = &tile->ranges[page];
        struct Slots slots;
        enum Source source = prepare(call, &call->keys, range, scratch, &slots);
        int parts = range->count / together_with(chunk_of(heads));
        if (page + 1 < tile->pages) plan_prefetch(call, &call->keys, range->kv_head, range[1].page, parts, &slots);
        else plan_prefetch(call, &call->values, range->kv_head, tile->ranges[0].page, parts, &slots);
        for (int q = 0, chunk; q < heads; q += chunk) {
            chunk = chunk_of(heads - q);
            WITH_CONSTANTS(score_slots, source, chunk, &slots, range->count, blocks, query + (int64_t)q * head_dim,
                           scores + q * stride, stride)
            slots.next_bytes = 0;
        }
        scores += range->count;
    }
    if (!is_scaled_after(call->keys.layout)) return;
    read_tile_scales(&call->keys, tile, scratch);
    for (int q = 0; q < heads; q++) scale_scores(scratch, tile->slots, query_sums[q], scratch->scores + q * stride);
}

// Adds the weighted values of a tile's slots to acc [heads, head_dim], and to acc_addends [heads] what all channels
// get besides.
static void add_tile(const struct Call *call, const struct Tile *tile, int heads, const struct Scratch *scratch,
                     float *acc, float *acc_addends) {
    int head_dim = call->layout.head_dim, blocks = head_dim / LANES;
    int64_t stride = tile_slots_of(call);
    float *weights = scratch->scores;
    if (is_scaled_after(call->values.layout)) {
        read_tile_scales(&call->values, tile, scratch);
        for (int q = 0; q < heads; q++) acc_addends[q] += scale_weights(scratch, tile->slots, weights + q * stride);
    }
    for (int page = 0; page < tile->pages; page++) {
        const struct Range *range = &tile->ranges[page];
        struct Slots slots;
        enum Source source = prepare(call, &call->values, range, scratch, &slots);
        int parts = blocks / together_with(chunk_of(heads));
        if (page + 1 < tile->pages) plan_prefetch(call, &call->values, range->kv_head, range[1].page, parts, &slots);
        else plan_prefetch(call, &call->keys, range->kv_head, tile->next_page, parts, &slots);
        for (int q = 0, chunk; q < heads; q += chunk) {
            chunk = chunk_of(heads - q);
            WITH_CONSTANTS(add_slots, source, chunk, &slots, range->count, blocks, weights + q * stride, stride,
                           acc + (int64_t)q * head_dim)
            slots.next_bytes = 0;
        }
        weights += range->count;
    }
}

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

void PASTE(attend_piece_, KERNEL)(const struct Call *call, const struct Piece *piece, struct State state,
                                  float *memory) {
    const struct CallLayout *layout = &call->layout;
    int heads = layout->q_heads / layout->kv_heads, head_dim = layout->head_dim, blocks = head_dim / LANES;
    int64_t first_head = (int64_t)piece->row * layout->q_heads + (int64_t)piece->kv_head * heads;
    const float *query = call->query + first_head * head_dim;
    int64_t tile_slots = tile_slots_of(call), numbers = numbers_of(call);
    struct Scratch scratch = {.elements = memory};
    scratch.factors = memory += (int64_t)layout->page_size * head_dim + MOST_LANES;
    scratch.addends = memory += numbers;
    scratch.scores = memory += numbers;
    float *query_sums = memory += heads * tile_slots; // [heads], over the channels
    float *acc_addends = memory += heads;             // [heads], what all channels of acc get besides

    for (int q = 0; q < heads; q++) {
        state.highest[q] = MASK_VALUE, state.sum[q] = 0, acc_addends[q] = 0, query_sums[q] = 0;
        for (int channel = 0; channel < head_dim; channel++) query_sums[q] += query[(int64_t)q * head_dim + channel];
    }
    memset(state.acc, 0, sizeof(float) * heads * head_dim);
    struct Tile tile;
    for (int page = piece->first_page; page < piece->end_page;) {
        page = next_tile(call, piece, page, &tile);
        score_tile(call, &tile, heads, query, query_sums, &scratch);
        for (int q = 0; q < heads; q++) {
            float *weights = scratch.scores + q * tile_slots;
            float shrink = weigh(layout->soft_cap, weights, tile.slots, &state.highest[q], &state.sum[q]);
            if (shrink == 1) continue;
            float *acc = state.acc + (int64_t)q * head_dim;
            for (int block = 0; block < blocks; block++) store(acc + block * LANES, load(acc + block * LANES) * shrink);
            acc_addends[q] *= shrink;
        }
        add_tile(call, &tile, heads, &scratch, state.acc, acc_addends);
    }
    for (int q = 0; q < heads; q++)
        for (int channel = 0; channel < head_dim; channel++)
            state.acc[(int64_t)q * head_dim + channel] += acc_addends[q];
}

#ifdef IS_BASELINE
int64_t scratch_floats(const struct Call *call) {
    int64_t heads = call->layout.q_heads / call->layout.kv_heads;
    int64_t elements = (int64_t)call->layout.page_size * call->layout.head_dim;
    int64_t floats = elements + MOST_LANES + 2 * numbers_of(call) + heads * (tile_slots_of(call) + 2);
    return (floats + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
}
#endif
