// A page made ready for the loops of the kernel: its codes as bytes, its scales as floats.
#ifndef QPAGED_PAGE_H
#define QPAGED_PAGE_H

#include "kernel.h"
#include "lanes.h"
#include "states.h"
#include "unpack.h"

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
    const uint8_t *later; // a page that is read later; the loops fetch it meanwhile
    int later_lines, lines_per_step;
    const float *factors, *addends; // [slots, groups], or [groups] where slot_stride is 0; the value of a code is
    int slot_stride, group_size;    // code * factor + addend
    int group_shift;                // OF_GROUPS: a group has 2^group_shift blocks of lanes
};

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

// What codes of 8 bits stand for, in units of their scale, as bfloat16.
struct HalfTable {
    int is_exact; // no value has more bits than bfloat16 has
    uint16_t halves[256];
};

static struct HalfTable half_table_of(const struct Pool *pool) {
    struct HalfTable table = {.is_exact = pool->layout->element == TABLE_CODES && pool->layout->bits == 8};
    for (int code = 0; table.is_exact && code < 256; code++) {
        uint32_t word;
        memcpy(&word, pool->code_values + code, sizeof word);
        table.is_exact = !(word & 0xffff);
        table.halves[code] = word >> 16;
    }
    return table;
}

// A scratch for one page, of keys or of values, and for the scores of a tile.
struct Scratch {
    struct HalfTable of_keys, of_values;
    int8_t of_key_states[MOST_STATES], of_value_states[MOST_STATES];
    uint8_t *ring;            // [MOST_BEFORE + head_dim], and a vector of room
    void *elements;           // [page_size, head_dim] floats, or as many codes; and MOST_LANES floats of room
    float *factors, *addends; // [page_size, head_dim], or those of the tile's slots
    float *scores;            // [heads, tile_slots]
};

// Sets what codes of 8 bits stand for, in units of their scale.
static void look_up_halves(const struct HalfTable *table, const uint8_t *codes, int count, uint16_t *halves) {
    int i = 0;
#if defined __AVX512F__
    __m512i parts[8]; // of 32 values
    for (int part = 0; part < 8; part++) parts[part] = _mm512_loadu_si512(table->halves + 32 * part);
    for (; i + 32 <= count; i += 32) {
        __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
        __mmask32 in_odd = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)); // quarter of the table
        __mmask32 in_last = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
        __m512i quarters[4];
        for (int quarter = 0; quarter < 4; quarter++)
            quarters[quarter] = _mm512_permutex2var_epi16(parts[2 * quarter], at, parts[2 * quarter + 1]);
        __m512i first = _mm512_mask_blend_epi16(in_odd, quarters[0], quarters[1]);
        __m512i last = _mm512_mask_blend_epi16(in_odd, quarters[2], quarters[3]);
        _mm512_storeu_si512(halves + i, _mm512_mask_blend_epi16(in_last, first, last));
    }
#endif
    for (; i < count; i++) halves[i] = table->halves[codes[i]];
}

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
        const int8_t *of_states = pool == &call->keys ? scratch->of_key_states : scratch->of_value_states;
        if (layout->state_bits)
            look_up_states(layout, of_states, count, head_dim, scratch->ring, scratch->elements);
    }
    if (!is_scaled_after(layout)) {
        slots->factors = scratch->factors, slots->addends = scratch->addends;
        slots->slot_stride = read_scales(pool, range, scratch->factors, scratch->addends);
        slots->group_size = head_dim / layout->scales.groups;
    }
    if (layout->element == EVEN_CODES) {
        if (is_scaled_after(layout)) return OF_CODES;
        slots->group_shift = slots->group_size < LANES ? 0 : __builtin_ctz(slots->group_size / LANES);
        if (LANES << slots->group_shift == slots->group_size) return OF_GROUPS;
        if (slots->group_size == 1 && slots->slot_stride == 0) return OF_CHANNELS;
    }
    const struct HalfTable *halves = pool == &call->keys ? &scratch->of_keys : &scratch->of_values;
    if (halves->is_exact && is_scaled_after(layout)) {
        look_up_halves(halves, elements, count * head_dim, scratch->elements);
        slots->elements = scratch->elements;
        slots->slot_bytes = (int64_t)head_dim * 2;
        return OF_BFLOAT16;
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

#endif
