// Codes of fewer than 8 bits, unpacked to bytes.
#ifndef QPAGED_UNPACK_H
#define QPAGED_UNPACK_H

#include "kernel.h"
#include "lanes.h"

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

#endif
