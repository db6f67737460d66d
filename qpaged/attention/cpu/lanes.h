// Vectors of floats, and of bytes, as wide as the instruction set has them.
#ifndef QPAGED_LANES_H
#define QPAGED_LANES_H

#include <math.h>
#include <stdint.h>
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

#endif
