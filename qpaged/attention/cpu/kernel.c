// Attention of one decode row over pages where they lie, for one KV head and the query heads that share it.
//
// This file is compiled once for each instruction set; KERNEL is the name that its function then has. A page is
// read once: codes become floats in registers, are multiplied with all query heads there, and are gone. What
// pages need before that (unpacked codes, factors as floats) is put into a scratch that the first cache holds.
// Pages are worked through in tiles, so that the softmax, which has little to do for a page, has enough at once.
#include "kernel.h"
#include "lanes.h"
#include "page.h"

#define TILE 128   // slots that are weighed at once, where pages are not longer
#define AHEAD 8192 // bytes of codes that are fetched ahead of those that are read: memory answers that late

// Fetches some lines of a later page, so that few are on their way at any time.
INLINE void prefetch(const struct Slots *slots, int step) {
    int line = step * slots->lines_per_step, end = line + slots->lines_per_step;
    for (; line < end && line < slots->later_lines; line++) __builtin_prefetch(slots->later + 64 * line);
}

INLINE lanes element_lanes(enum Source source, const struct Slots *slots, int slot, int block) {
    const uint8_t *at = slots->elements + slot * slots->slot_bytes;
    int channel = block * LANES;
    if (source == OF_FLOATS) return load((const float *)at + channel);
    if (source == OF_BFLOAT16) return from_bfloat16((const uint16_t *)at + channel);
    lanes codes = from_bytes((const int8_t *)at + channel);
    if (source == OF_CODES) return codes;
    if (source == OF_CHANNELS) return codes * load(slots->factors + channel) + load(slots->addends + channel);
    int group = slot * slots->slot_stride + (block >> slots->group_shift);
    return codes * slots->factors[group] + slots->addends[group];
}

// Sets scores[q][slot] for `heads` query heads and `together` slots.
INLINE void score_together(enum Source source, int heads, int together, const struct Slots *slots, int first,
                           int blocks, const float *query, float *scores, int64_t score_stride) {
    lanes sums[4][4] = {}; // [heads, together]
    for (int block = 0; block < blocks; block++) {
        prefetch(slots, first / together * blocks + block);
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
    for (; slot + together <= count; slot += together)
        score_together(source, heads, together, slots, slot, blocks, query, scores, score_stride);
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
        prefetch(slots, block / together * count + slot);
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
    for (; block + together <= blocks; block += together)
        add_together(source, heads, together, slots, count, block, blocks, weights, weight_stride, acc);
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
    const int32_t *later; // pages of the pool after these
    int later_pages;
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
    tile->later = table + page;
    tile->later_pages = piece->end_page - page;
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

// Has the loops fetch a later page, in so many steps.
static void plan_prefetch(const struct Call *call, const struct Pool *pool, int kv_head, int page, int steps,
                          struct Slots *slots) {
    if (page < 0 || page >= call->layout.num_pages) return;
    int64_t bytes = page_bytes_of(call, pool);
    if (steps < 1) steps = 1;
    slots->later = pool->elements + (kv_head * (int64_t)call->layout.num_pages + page) * bytes;
    slots->later_lines = (bytes + 63) / 64;
    slots->lines_per_step = (slots->later_lines + steps - 1) / steps;
    prefetch_numbers(&pool->layout->scales, pool->scales, kv_head, page, call->layout.page_size);
    prefetch_numbers(&pool->layout->global_scales, pool->global_scales, kv_head, page, call->layout.page_size);
}

INLINE int pages_ahead(const struct Call *call, const struct Pool *pool) {
    int64_t pages = AHEAD / page_bytes_of(call, pool);
    return pages > 1 ? pages : 1;
}

// Sets the scores of a tile's slots.
static void score_tile(const struct Call *call, const struct Tile *tile, int heads, const float *query,
                       const float *query_sums, const struct Scratch *scratch) {
    int head_dim = call->layout.head_dim, blocks = head_dim / LANES;
    int64_t stride = tile_slots_of(call), kv_head = tile->ranges[0].kv_head;
    float *scores = scratch->scores;
    for (int page = 0; page < tile->pages; page++) {
        const struct Range *range = &tile->ranges[page];
        struct Slots slots;
        enum Source source = prepare(call, &call->keys, range, scratch, &slots);
        int steps = range->count / together_with(chunk_of(heads)) * blocks;
        int later = page + pages_ahead(call, &call->keys);
        if (later < tile->pages)
            plan_prefetch(call, &call->keys, kv_head, tile->ranges[later].page, steps, &slots);
        else if ((later -= tile->pages) < tile->pages)
            plan_prefetch(call, &call->values, kv_head, tile->ranges[later].page, steps, &slots);
        for (int q = 0, chunk; q < heads; q += chunk) {
            chunk = chunk_of(heads - q);
            WITH_CONSTANTS(score_slots, source, chunk, &slots, range->count, blocks, query + (int64_t)q * head_dim,
                           scores + q * stride, stride)
            slots.later_lines = 0;
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
    int64_t stride = tile_slots_of(call), kv_head = tile->ranges[0].kv_head;
    float *weights = scratch->scores;
    if (is_scaled_after(call->values.layout)) {
        read_tile_scales(&call->values, tile, scratch);
        for (int q = 0; q < heads; q++) acc_addends[q] += scale_weights(scratch, tile->slots, weights + q * stride);
    }
    for (int page = 0; page < tile->pages; page++) {
        const struct Range *range = &tile->ranges[page];
        struct Slots slots;
        enum Source source = prepare(call, &call->values, range, scratch, &slots);
        int steps = blocks / together_with(chunk_of(heads)) * range->count;
        int later = page + pages_ahead(call, &call->values);
        if (later < tile->pages)
            plan_prefetch(call, &call->values, kv_head, tile->ranges[later].page, steps, &slots);
        else if ((later -= tile->pages) < tile->later_pages)
            plan_prefetch(call, &call->keys, kv_head, tile->later[later], steps, &slots);
        for (int q = 0, chunk; q < heads; q += chunk) {
            chunk = chunk_of(heads - q);
            WITH_CONSTANTS(add_slots, source, chunk, &slots, range->count, blocks, weights + q * stride, stride,
                           acc + (int64_t)q * head_dim)
            slots.later_lines = 0;
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
    uint8_t ring[MOST_BEFORE + head_dim + sizeof(bytes)];
    struct Scratch scratch = {half_table_of(&call->keys), half_table_of(&call->values), .ring = ring, .elements = memory};
    fill_table(&call->keys, scratch.of_key_states);
    fill_table(&call->values, scratch.of_value_states);
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
        if (!tile.pages) continue;
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
