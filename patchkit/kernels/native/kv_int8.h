// Vectors in int8: codes, then the two bytes of a bfloat16 scale, the low one first. patchkit/kernels/kv_int8.py has the format.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// The bits of a bfloat16, rounded to nearest even; a NaN stays one.
static inline uint32_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

static inline float from_bf16(uint32_t bits) {
    float x;
    bits <<= 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

static inline float scale_of(const int8_t* packed, int64_t width) {
    return from_bf16(static_cast<uint32_t>(static_cast<uint8_t>(packed[width + 1])) << 8 | static_cast<uint8_t>(packed[width]));
}

// Cosines and sines of one offset. Tables are [rows, 2, pairs].
static inline void angles_at(int64_t offset, const float* coarse, const float* fine, int64_t pairs, float* cosine, float* sine) {
    const float* __restrict__ a = coarse + (offset >> 8) * 2 * pairs;
    const float* __restrict__ c = fine + (offset & 255) * 2 * pairs;
    const float *b = a + pairs, *d = c + pairs;
    for (int64_t i = 0; i < pairs; ++i) {
        cosine[i] = a[i] * c[i] - b[i] * d[i];
        sine[i] = b[i] * c[i] + a[i] * d[i];
    }
}
