// Fused elementwise work of a training step on a CPU, in portable C that compilers vectorise: what lies between the matrix
// products, and an optimizer's step. Loaded by native.py, which compiles it once on each machine; every function has a reference in plain torch.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bf16(uint16_t stored) { return bits_to_float((uint32_t)stored << 16); }

static inline uint16_t to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : nearest);
}

// exp(x) within 2 units in the last place: 2^n times a polynomial on |r| <= ln(2) / 2. NaN stays NaN.
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = rintf(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
}

#define LANES 16

// Philox4x32 with 7 rounds (ftlab_kernels.random) for a key and the counters first .. first + LANES - 1: 4 words each.
static inline void philox(uint32_t *c0, uint32_t *c1, uint32_t *c2, uint32_t *c3, uint64_t key, uint64_t first) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma omp simd
    for (int i = 0; i < LANES; i++) {
        const uint64_t counter = first + (uint64_t)i;
        c0[i] = (uint32_t)counter;
        c1[i] = (uint32_t)(counter >> 32);
        c2[i] = 0;
        c3[i] = 0;
    }
    for (int round = 0; round < 7; round++) {
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            const uint64_t product_0 = (uint64_t)0xD2511F53u * c0[i], product_2 = (uint64_t)0xCD9E8D57u * c2[i];
            c0[i] = (uint32_t)(product_2 >> 32) ^ c1[i] ^ k0;
            c2[i] = (uint32_t)(product_0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)product_2;
            c3[i] = (uint32_t)product_0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The mask bytes of `count` groups from counter `first` on.
static void draw_row(uint8_t *bits, int64_t seed, uint64_t first, int64_t count, uint32_t drop_below) {
    for (int64_t start = 0; start < count; start += LANES) {
        uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES], byte[LANES];
        philox(c0, c1, c2, c3, (uint64_t)seed, first + (uint64_t)start);
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            byte[i] = (uint32_t)((c0[i] & 0xFFFF) >= drop_below) | (uint32_t)(c0[i] >> 16 >= drop_below) << 1 |
                      (uint32_t)((c1[i] & 0xFFFF) >= drop_below) << 2 | (uint32_t)(c1[i] >> 16 >= drop_below) << 3 |
                      (uint32_t)((c2[i] & 0xFFFF) >= drop_below) << 4 | (uint32_t)(c2[i] >> 16 >= drop_below) << 5 |
                      (uint32_t)((c3[i] & 0xFFFF) >= drop_below) << 6 | (uint32_t)(c3[i] >> 16 >= drop_below) << 7;
        }
        for (int i = 0; i < LANES && start + i < count; i++) bits[start + i] = (uint8_t)byte[i];
    }
}

#include "native_adamw.h"

#define T float
#define FN(name) name##_f32
#define LOAD(pointer) (*(pointer))
#define STORE(pointer, value) (*(pointer) = (value))
#include "native_ops.h"
#undef T
#undef FN
#undef LOAD
#undef STORE

#define T uint16_t
#define FN(name) name##_bf16
#define LOAD(pointer) from_bf16(*(pointer))
#define STORE(pointer, value) (*(pointer) = to_bf16(value))
#include "native_ops.h"
