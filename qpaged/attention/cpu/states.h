// Codes of a trellis become what their states stand for: a state is a code with those before it along its slot, around
// the end, and the newest code has the highest bits.
#ifndef QPAGED_STATES_H
#define QPAGED_STATES_H

#include "kernel.h"
#include "lanes.h"
#include "unpack.h"

#define MOST_STATES 4096
#define MOST_BEFORE 16 // codes before another that its state may have: bits of a state, and more

// The states of as many codes as fill a vector: their lowest 8 bits, and those above.
struct States {
    bytes low, high;
};

// Returns the states with `window` bits put in from bit `to` on: of each code from bit `from` on, and of those before it.
INLINE struct States with_window(struct States states, int bits, int from, int window, int to, const uint8_t *codes) {
    for (int age = 0; bits * age < window; age++) {
        bytes of_plane;
        memcpy(&of_plane, codes - age, sizeof of_plane);
        of_plane = of_plane >> from & fill_bytes((1 << bits) - 1);
        int at = to + window - bits * (age + 1);
        if (at < to) of_plane >>= to - at, at = to; // of the oldest code the highest bits count
        if (at >= 8) states.high |= of_plane << (at - 8);
        else states.low |= of_plane << at;
        if (at < 8 && at + bits > 8) states.high |= of_plane >> (8 - at);
    }
    return states;
}

INLINE struct States states_of(int low_bits, int high_bits, int low_window, int state_bits, const uint8_t *codes) {
    struct States states = with_window((struct States){}, low_bits, 0, low_window, 0, codes);
    if (high_bits) states = with_window(states, high_bits, low_bits, state_bits - low_window, low_window, codes);
    return states;
}

// Makes a ring of a slot's codes: before the first one lie the last ones. Returns where the first one is.
INLINE uint8_t *ring_of(const uint8_t *codes, int head_dim, uint8_t *ring) {
    memcpy(ring + MOST_BEFORE, codes, head_dim);
    memcpy(ring, codes + head_dim - MOST_BEFORE, MOST_BEFORE);
    return ring + MOST_BEFORE;
}

INLINE void store_some(bytes values, int count, uint8_t *to) {
    if (count >= (int)sizeof values) memcpy(to, &values, sizeof values);
    else memcpy(to, &values, count);
}

// Sets what the codes [slots, head_dim] stand for, in their place; `ring` has room for a slot, MOST_BEFORE codes before
// it and a vector behind.
INLINE void look_up_any(int low_bits, int high_bits, int low_window, int state_bits, const int8_t *table, int slots,
                        int head_dim, uint8_t *ring, uint8_t *codes) {
    for (uint8_t *end = codes + (int64_t)slots * head_dim; codes < end; codes += head_dim) {
        const uint8_t *from = ring_of(codes, head_dim, ring);
        for (int i = 0; i < head_dim; i += sizeof(bytes)) {
            struct States states = states_of(low_bits, high_bits, low_window, state_bits, from + i);
            bytes values;
            for (int k = 0; k < (int)sizeof values; k++) values[k] = table[states.low[k] | states.high[k] << 8];
            store_some(values, head_dim - i, codes + i);
        }
    }
}

#if defined __AVX512BW__
#define VBMI __attribute__((target("avx512vbmi")))

// The same for states of 10 bits, whose table registers hold.
INLINE VBMI void look_up_in_registers(int low_bits, int high_bits, int low_window, const int8_t *table, int slots,
                                      int head_dim, uint8_t *ring, uint8_t *codes) {
    __m512i parts[16];
    for (int part = 0; part < 16; part++) parts[part] = _mm512_loadu_si512(table + 64 * part);
    for (uint8_t *end = codes + (int64_t)slots * head_dim; codes < end; codes += head_dim) {
        const uint8_t *from = ring_of(codes, head_dim, ring);
        for (int i = 0; i < head_dim; i += sizeof(bytes)) {
            struct States states = states_of(low_bits, high_bits, low_window, 10, from + i);
            __m512i low = (__m512i)states.low, high = (__m512i)states.high, some[8];
            for (int k = 0; k < 8; k++) some[k] = _mm512_permutex2var_epi8(parts[2 * k], low, parts[2 * k + 1]);
            __mmask64 bit_7 = _mm512_movepi8_mask(low);
            __mmask64 bit_8 = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1));
            __mmask64 bit_9 = _mm512_test_epi8_mask(high, _mm512_set1_epi8(2));
            for (int k = 0; k < 4; k++) some[k] = _mm512_mask_blend_epi8(bit_7, some[2 * k], some[2 * k + 1]);
            for (int k = 0; k < 2; k++) some[k] = _mm512_mask_blend_epi8(bit_8, some[2 * k], some[2 * k + 1]);
            store_some((bytes)_mm512_mask_blend_epi8(bit_9, some[0], some[1]), head_dim - i, codes + i);
        }
    }
}

static VBMI void look_up_twos(const int8_t *table, int slots, int head_dim, uint8_t *ring, uint8_t *codes) {
    look_up_in_registers(2, 0, 10, table, slots, head_dim, ring, codes);
}

static VBMI void look_up_threes(const int8_t *table, int slots, int head_dim, uint8_t *ring, uint8_t *codes) {
    look_up_in_registers(2, 1, 6, table, slots, head_dim, ring, codes);
}
#endif

static void look_up_states(const struct PoolLayout *layout, const int8_t *table, int slots, int head_dim, uint8_t *ring,
                           uint8_t *codes) {
    int low_bits = layout->bits == 3 ? 2 : layout->bits < 4 ? layout->bits : 4, high_bits = layout->bits - low_bits;
#if defined __AVX512BW__
    if (layout->state_bits == 10 && __builtin_cpu_supports("avx512vbmi")) {
        if (layout->bits == 2) return look_up_twos(table, slots, head_dim, ring, codes);
        if (layout->bits == 3) return look_up_threes(table, slots, head_dim, ring, codes);
    }
#endif
    look_up_any(low_bits, high_bits, layout->low_window, layout->state_bits, table, slots, head_dim, ring, codes);
}

// Sets what all states of a trellis stand for, in steps.
static void fill_table(const struct Pool *pool, int8_t *table) {
    if (!pool->layout->state_bits) return;
    for (int state = 0; state < 1 << pool->layout->state_bits; state++) table[state] = (int8_t)pool->code_values[state];
}

#endif
