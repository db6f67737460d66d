// What the FFI handler and the kernel share. See kernel.c for what is computed.
#ifndef QPAGED_KERNEL_H
#define QPAGED_KERNEL_H

#include <stdint.h>

#define MASK_VALUE (-0x1.666665p+127f) // the highest score before there is one; finite, so that differences are no NaN

// How the elements of pages are stored.
enum Element {
    FLOAT32 = 0,
    BFLOAT16 = 1,
    EVEN_CODES = 2,  // codes in even steps: the value of code c is step * c + start
    TABLE_CODES = 3, // any other codes of at most 8 bits; a table has the value of each
};

// How a factor or an offset is stored.
enum Number {
    ABSENT = 0,
    NUMBER_FLOAT32 = 1,
    NUMBER_BFLOAT16 = 2,
    NUMBER_LOW_HALF = 3,   // a bfloat16 in the lower half of a 32-bit word
    NUMBER_HIGH_HALF = 4,  // a bfloat16 in the upper half of a 32-bit word
    NUMBER_BYTE = 5,       // a byte; a table has the value of each
    NUMBER_WORD = 6,       // 16 bits; likewise
};

// Numbers of blocks, (kv_heads, pages, slots, groups); a stride is 0 where an axis has a length of one.
struct Blocks {
    int32_t number;
    int32_t groups; // along the channels
    int64_t head_stride, page_stride, slot_stride; // in elements
};

// How a pool (kv_heads, pages, page_size, head_dim) is stored. The Python side fills it in: _cpu_layout.py.
struct PoolLayout {
    int32_t element;
    int32_t bits;     // of a code
    int32_t sign_bit; // of packed codes; 0 if they have no sign
    float step, start;
    int32_t has_map;
    int8_t map[16]; // what codes of at most 4 bits are in steps, where they are not what they seem
    int32_t state_bits; // of a trellis, whose codes are read together; 0 if they are read one by one
    int32_t low_window; // bits of a state that are of the low plane
    struct Blocks scales, offsets, global_scales;
};

// What is known of a call when it is compiled. The Python side fills it in.
struct CallLayout {
    int32_t rows, q_heads, kv_heads, head_dim, table_pages, page_size, num_pages;
    int32_t window; // 0 for none
    float soft_cap; // 0 for none
    struct PoolLayout keys, values;
};

struct Pool {
    const struct PoolLayout *layout;
    const uint8_t *elements;
    const float *code_values;  // of TABLE_CODES, by code; of a trellis, in steps by state
    const void *scales;        // offsets lie in the same words
    const void *global_scales;
    const float *factor_values, *offset_values, *global_values; // of bytes and words, by these
};

// One call: decode rows over pages.
struct Call {
    struct CallLayout layout;
    const float *query;      // [rows, q_heads, head_dim], times the softmax scale
    const int32_t *position; // [rows]
    const int32_t *end;      // [rows]
    const int32_t *table;    // [rows, table_pages]
    struct Pool keys, values;
};

// The queries of one KV head of one row, attending to a range of its pages.
struct Piece {
    int32_t row, kv_head;
    int32_t first_page, end_page; // logical
    int32_t first_slot, end_slot; // that the row sees
};

// The online softmax of a piece, [q_heads_per_kv] each, and acc [q_heads_per_kv, head_dim].
struct State {
    float *highest, *sum, *acc;
};

// Attends one piece. `scratch` has scratch_floats(call) floats, aligned to 64 bytes. The state need not be set.
typedef void AttendPiece(const struct Call *call, const struct Piece *piece, struct State state, float *scratch);

int64_t scratch_floats(const struct Call *call);

extern AttendPiece attend_piece_baseline;
#ifdef __x86_64__
extern AttendPiece attend_piece_avx2, attend_piece_avx512;
#endif

#endif
