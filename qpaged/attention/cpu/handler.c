// The XLA FFI handler of the kernel: reads a call, divides it into pieces, and works through them with XLA's
// threads.
#define _GNU_SOURCE
#include "kernel.h"

// xla_ffi.h is xla/ffi/api/c_api.h of jaxlib 0.4.35, unchanged (Apache 2.0): version 0.1 of the interface, which
// later versions of XLA take too, where an older one would refuse theirs. It is written for C++, where a struct's
// name is a type of itself.
typedef struct XLA_FFI_ByteSpan XLA_FFI_ByteSpan;
typedef struct XLA_FFI_TypeId XLA_FFI_TypeId;
typedef struct XLA_FFI_Handler_Bundle XLA_FFI_Handler_Bundle;
#include "xla_ffi.h"

#include <math.h>
#include <stdbool.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

// The operands, in order. Those that a pool does not have are empty.
enum PoolOperand {
    ELEMENTS,
    CODE_VALUES,
    SCALES,
    GLOBAL_SCALES,
    FACTOR_VALUES,
    OFFSET_VALUES,
    GLOBAL_VALUES,
    POOL_OPERANDS
};
enum Operand {
    LAYOUT,
    QUERY,
    POSITION,
    END,
    TABLE,
    KEYS,
    VALUES = KEYS + POOL_OPERANDS,
    OPERANDS = VALUES + POOL_OPERANDS
};
enum Result { ACC, HIGHEST, SUM, RESULTS };

static AttendPiece *attend_piece;
static const char *instruction_set = "baseline";

static void choose_instruction_set(void) {
    attend_piece = attend_piece_baseline;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        attend_piece = attend_piece_avx2, instruction_set = "avx2";
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        attend_piece = attend_piece_avx512, instruction_set = "avx512";
    }
#endif
}

__attribute__((constructor)) static void start(void) { choose_instruction_set(); }

EXPORT const char *qpaged_instruction_set(void) { return instruction_set; }

EXPORT int64_t qpaged_layout_size(void) { return sizeof(struct CallLayout); }

// The work of a call. Threads that XLA starts late find nothing left, and look at `next` and `owners` alone.
struct Work {
    struct Call call;
    struct Piece *rows;   // [rows], all that each row sees
    int32_t *first_piece; // [rows + 1], of the row's first KV head
    int32_t pages_per_piece;
    bool has_divided_rows; // some row has several pieces for each KV head
    struct State states;   // of the rows' query heads, or of pieces where there are such rows
    float *divided;      // their memory; NULL if they are not
    float *scratches;    // one for each thread
    atomic_int next, done, owners, helpers;
};

static int32_t available_threads(void) {
#ifdef __linux__
    cpu_set_t set; // smaller than the processors that there are where the call fails
    if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
    return sysconf(_SC_NPROCESSORS_ONLN);
}

static int32_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int32_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void release(struct Work *work) {
    if (atomic_fetch_sub(&work->owners, 1) > 1) return;
    free(work->scratches);
    free(work->divided);
    free(work->first_piece);
    free(work->rows);
    free(work);
}

static struct Piece visible_piece(const struct Call *call, int32_t row) {
    int64_t page_size = call->layout.page_size, window = call->layout.window;
    int64_t end = least(least((int64_t)call->position[row] + 1, call->end[row]), call->layout.table_pages * page_size);
    int64_t first = window ? (int64_t)call->position[row] + 1 - window : 0;
    if (first < 0) first = 0;
    if (end <= first) return (struct Piece){.row = row};
    return (struct Piece){row, 0, first / page_size, divide(end, page_size), first, end};
}

// Sets what each row sees and how its pages are divided: into so few pieces that each is worth a thread's turn.
static void plan(struct Work *work, int32_t threads) {
    const struct Call *call = &work->call;
    int32_t rows = call->layout.rows, kv_heads = call->layout.kv_heads;
    int64_t pages = 0;
    for (int32_t row = 0; row < rows; row++) {
        work->rows[row] = visible_piece(call, row);
        pages += work->rows[row].end_page - work->rows[row].first_page;
    }
    int64_t turns = 8 * threads, least_pages = divide(512, call->layout.page_size);
    int64_t pages_per_piece = divide(pages * kv_heads, turns);
    if (pages_per_piece < least_pages) pages_per_piece = least_pages;
    work->pages_per_piece = threads == 1 ? INT32_MAX : least(pages_per_piece, INT32_MAX);
    work->first_piece[0] = 0;
    for (int32_t row = 0; row < rows; row++) {
        int32_t row_pages = work->rows[row].end_page - work->rows[row].first_page;
        int32_t parts = divide(row_pages, work->pages_per_piece);
        work->has_divided_rows |= parts > 1;
        work->first_piece[row + 1] = work->first_piece[row] + kv_heads * parts;
    }
}

static struct State state_at(struct State states, const struct Call *call, int64_t index) {
    int64_t heads = call->layout.q_heads / call->layout.kv_heads, first = index * heads;
    return (struct State){states.highest + first, states.sum + first, states.acc + first * call->layout.head_dim};
}

static void attend_numbered(struct Work *work, int32_t number, float *scratch) {
    const struct Call *call = &work->call;
    int32_t row = 0, beyond = call->layout.rows; // the last row whose first piece is not after this one
    while (beyond - row > 1) {
        int32_t middle = row + (beyond - row) / 2;
        if (work->first_piece[middle] <= number) row = middle;
        else beyond = middle;
    }
    int32_t in_row = number - work->first_piece[row];
    int32_t parts = (work->first_piece[row + 1] - work->first_piece[row]) / call->layout.kv_heads;
    struct Piece piece = work->rows[row];
    piece.kv_head = in_row / parts;
    piece.first_page += in_row % parts * (int64_t)work->pages_per_piece;
    piece.end_page = least(piece.end_page, (int64_t)piece.first_page + work->pages_per_piece);
    int64_t index = work->divided ? number : (int64_t)row * call->layout.kv_heads + piece.kv_head;
    attend_piece(call, &piece, state_at(work->states, call, index), scratch);
}

// Works through pieces until none is left, on the thread of that number; the one that XLA called has 0.
static void attend_pieces(struct Work *work, int32_t thread) {
    int32_t pieces = work->first_piece[work->call.layout.rows];
    float *scratch = work->scratches + thread * scratch_floats(&work->call);
    for (int32_t number; (number = atomic_fetch_add(&work->next, 1)) < pieces; atomic_fetch_add(&work->done, 1))
        attend_numbered(work, number, scratch);
}

static void help(void *data) {
    struct Work *work = data;
    attend_pieces(work, atomic_fetch_add(&work->helpers, 1) + 1);
    release(work);
}

// Merges the pieces of each row and KV head by their highest scores.
static void merge(const struct Work *work, struct State rows) {
    const struct Call *call = &work->call;
    int32_t kv_heads = call->layout.kv_heads, heads = call->layout.q_heads / kv_heads, head_dim = call->layout.head_dim;
    for (int32_t row = 0; row < call->layout.rows; row++) {
        int32_t parts = (work->first_piece[row + 1] - work->first_piece[row]) / kv_heads;
        for (int32_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            struct State merged = state_at(rows, call, (int64_t)row * kv_heads + kv_head);
            for (int32_t part = 0; part < parts; part++) {
                int64_t number = work->first_piece[row] + (int64_t)kv_head * parts + part;
                struct State state = state_at(work->states, call, number);
                for (int32_t q = 0; q < heads; q++) {
                    float highest = fmaxf(merged.highest[q], state.highest[q]);
                    float old = expf(merged.highest[q] - highest), new = expf(state.highest[q] - highest);
                    merged.highest[q] = highest;
                    merged.sum[q] = merged.sum[q] * old + state.sum[q] * new;
                    float *acc = merged.acc + (int64_t)q * head_dim;
                    for (int32_t channel = 0; channel < head_dim; channel++)
                        acc[channel] = acc[channel] * old + state.acc[(int64_t)q * head_dim + channel] * new;
                }
            }
        }
    }
}

static const void *operand(const XLA_FFI_CallFrame *frame, int number) {
    return ((const XLA_FFI_Buffer *)frame->args.args[number])->data;
}

static void *result(const XLA_FFI_CallFrame *frame, int number) {
    return ((const XLA_FFI_Buffer *)frame->rets.rets[number])->data;
}

static struct Pool pool_of(const XLA_FFI_CallFrame *frame, int first, const struct PoolLayout *layout) {
    return (struct Pool){
        .layout = layout,
        .elements = operand(frame, first + ELEMENTS),
        .code_values = operand(frame, first + CODE_VALUES),
        .scales = operand(frame, first + SCALES),
        .global_scales = operand(frame, first + GLOBAL_SCALES),
        .factor_values = operand(frame, first + FACTOR_VALUES),
        .offset_values = operand(frame, first + OFFSET_VALUES),
        .global_values = operand(frame, first + GLOBAL_VALUES),
    };
}

static XLA_FFI_Error *error_of(const XLA_FFI_CallFrame *frame, XLA_FFI_Error_Code code, const char *message) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
    return frame->api->XLA_FFI_Error_Create(&args);
}

// Lets XLA's threads help. What they have begun is waited for; what they have not is done by this thread.
static void attend_together(const XLA_FFI_CallFrame *frame, struct Work *work, int32_t threads) {
    int32_t pieces = work->first_piece[work->call.layout.rows];
    for (int32_t thread = 1; thread < least(threads, pieces); thread++) {
        atomic_fetch_add(&work->owners, 1);
        XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, help,
                                                 work};
        XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
        if (!error) continue;
        XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
        frame->api->XLA_FFI_Error_Destroy(&destroy);
        atomic_fetch_sub(&work->owners, 1);
        break; // there is no pool
    }
    attend_pieces(work, 0);
    while (atomic_load(&work->done) < pieces) sched_yield();
}

// Attends a call, and returns whether there was memory for it.
static bool attend(const XLA_FFI_CallFrame *frame, struct Work *work) {
    const struct Call *call = &work->call;
    int64_t rows = call->layout.rows, heads = call->layout.q_heads / call->layout.kv_heads;
    int64_t head_dim = call->layout.head_dim, all_heads = rows * call->layout.q_heads;
    struct State states = {result(frame, HIGHEST), result(frame, SUM), result(frame, ACC)};
    for (int64_t i = 0; i < all_heads; i++) states.highest[i] = MASK_VALUE, states.sum[i] = 0;
    memset(states.acc, 0, sizeof(float) * all_heads * head_dim);
    int32_t threads = available_threads();
    work->rows = malloc(sizeof *work->rows * rows);
    work->first_piece = malloc(sizeof *work->first_piece * (rows + 1));
    work->scratches = aligned_alloc(64, sizeof(float) * scratch_floats(call) * threads);
    if (!work->rows || !work->first_piece || !work->scratches) return false;
    plan(work, threads);
    work->states = states;
    int64_t pieces = work->first_piece[rows];
    if (work->has_divided_rows) {
        work->divided = malloc(sizeof(float) * pieces * heads * (head_dim + 2));
        if (!work->divided) return false;
        float *highest = work->divided;
        work->states = (struct State){highest, highest + pieces * heads, highest + 2 * pieces * heads};
    }
    attend_together(frame, work, threads);
    if (work->divided) merge(work, states);
    return true;
}

EXPORT XLA_FFI_Error *qpaged_attend(XLA_FFI_CallFrame *frame) {
    if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
        XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
        metadata->api_version.major_version = XLA_FFI_API_MAJOR;
        metadata->api_version.minor_version = XLA_FFI_API_MINOR;
        return NULL;
    }
    if (frame->args.size != OPERANDS || frame->rets.size != RESULTS)
        return error_of(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "qpaged_attend: another number of buffers");
    struct Work *work = calloc(1, sizeof *work);
    if (!work) return error_of(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "qpaged_attend: no memory");
    struct Call *call = &work->call;
    memcpy(&call->layout, operand(frame, LAYOUT), sizeof call->layout);
    call->query = operand(frame, QUERY);
    call->position = operand(frame, POSITION);
    call->end = operand(frame, END);
    call->table = operand(frame, TABLE);
    call->keys = pool_of(frame, KEYS, &call->layout.keys);
    call->values = pool_of(frame, VALUES, &call->layout.values);
    atomic_init(&work->owners, 1);

    XLA_FFI_Error *error = NULL;
    if (!attend(frame, work))
        error = error_of(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "qpaged_attend: no memory");
    release(work);
    return error;
}
