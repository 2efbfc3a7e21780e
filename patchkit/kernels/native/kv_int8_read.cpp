// kv_int8_read in one pass: codes times scale, the rotation of keys, and the rounding of the results.
//
// keys [batch, groups, count, k + 2] and values [batch, groups, count, v + 2] int8 with any strides but 1 in the last dimension; offsets
// [batch or 1, groups or 1, count]; tables [rows, 2, pairs] fp32; results contiguous, fp32 or bf16.
// Every key and value is computed by one thread, by the same operations whatever the number of threads.

#include <omp.h>

#include "kv_int8.h"

namespace {

constexpr int64_t kMostPairs = 512;
constexpr int64_t kSerial = 1 << 14;  // bytes below which a second thread costs more than it saves

inline void put(float* out, float x) { *out = x; }
inline void put(uint16_t* out, float x) { *out = static_cast<uint16_t>(to_bf16(x)); }

template <typename Out>
void plain(const int8_t* __restrict__ codes, float scale, int64_t count, Out* __restrict__ out) {
    for (int64_t i = 0; i < count; ++i) put(out + i, scale * static_cast<float>(codes[i]));
}

template <typename Out>
void turned(const int8_t* __restrict__ codes, float scale, const float* __restrict__ cosine, const float* __restrict__ sine, int64_t pairs,
            bool interleaved, Out* __restrict__ out) {
    if (interleaved) {
        for (int64_t i = 0; i < pairs; ++i) {
            const float a = scale * static_cast<float>(codes[2 * i]), b = scale * static_cast<float>(codes[2 * i + 1]);
            put(out + 2 * i, a * cosine[i] - b * sine[i]);
            put(out + 2 * i + 1, a * sine[i] + b * cosine[i]);
        }
        return;
    }
    const int8_t* __restrict__ second = codes + pairs;
    Out* __restrict__ upper = out + pairs;
    for (int64_t i = 0; i < pairs; ++i) {
        const float a = scale * static_cast<float>(codes[i]), b = scale * static_cast<float>(second[i]);
        put(out + i, a * cosine[i] - b * sine[i]);
        put(upper + i, a * sine[i] + b * cosine[i]);
    }
}

template <typename Out>
void read(const int8_t* keys, const int8_t* values, const int64_t* offsets, const float* coarse, const float* fine, Out* out_keys,
          Out* out_values, const int64_t* n, int threads) {
    const int64_t batch = n[0], groups = n[1], count = n[2], k = n[3], v = n[4], pairs = n[5], start = n[6];
    const bool interleaved = n[7] != 0;
    const int64_t* step = n + 9;  // strides of keys, of values, and of the offsets' rows and heads
    const int64_t all = batch * groups * count;
#pragma omp parallel for num_threads(threads) schedule(static) if (all * (k + v) > kSerial)
    for (int64_t i = 0; i < all; ++i) {
        float cosine[kMostPairs], sine[kMostPairs];
        const int64_t t = i % count, g = i / count % groups, b = i / (count * groups);
        const int8_t* key = keys + b * step[0] + g * step[1] + t * step[2];
        const int8_t* value = values + b * step[3] + g * step[4] + t * step[5];
        angles_at(offsets[b * step[6] + g * step[7] + t], coarse, fine, pairs, cosine, sine);
        const float scale = scale_of(key, k);
        Out* out = out_keys + i * k;
        const int64_t end = pairs == 0 ? 0 : start + 2 * pairs, first = pairs == 0 ? 0 : start;
        plain(key, scale, first, out);
        turned(key + first, scale, cosine, sine, pairs, interleaved, out + first);
        plain(key + end, scale, k - end, out + end);
        plain(value, scale_of(value, v), v, out_values + i * v);
    }
}

}  // namespace

extern "C" int patchkit_kv_int8_read(const int8_t* keys, const int8_t* values, const int64_t* offsets, const float* coarse,
                                     const float* fine, void* out_keys, void* out_values, const int64_t* sizes, int threads) {
    if (sizes[8] != 0) {
        read(keys, values, offsets, coarse, fine, static_cast<uint16_t*>(out_keys), static_cast<uint16_t*>(out_values), sizes, threads);
    } else {
        read(keys, values, offsets, coarse, fine, static_cast<float*>(out_keys), static_cast<float*>(out_values), sizes, threads);
    }
    return 0;
}
