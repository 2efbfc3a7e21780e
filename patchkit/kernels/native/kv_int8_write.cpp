// kv_int8_write in one pass: the rotation of new keys is taken back, and keys and values are rounded to int8 in their slots.
//
// keys [batch, groups, slots, k + 2] and values [batch, groups, slots, v + 2] int8, new_keys [batch, groups, count, k] and new_values
// [batch, groups, count, v] fp32, all contiguous; slots [count]; offsets [batch or 1, 1, count]; tables [rows, 2, pairs] fp32.
// One thread: it is a few vectors per step.

#include "kv_int8.h"

namespace {

constexpr int64_t kMost = 1024;  // dimensions of a vector

void pack(const float* x, int64_t width, int8_t* packed) {
    float largest = 0.0f;
    bool is_nan = false;
    for (int64_t i = 0; i < width; ++i) {
        const float size = std::fabs(x[i]);
        is_nan |= size != size;
        largest = size > largest ? size : largest;
    }
    const uint32_t bits = to_bf16((is_nan ? NAN : largest) / 127.0f);
    const float scale = from_bf16(bits), divisor = scale == 0.0f ? 1.0f : scale;
    for (int64_t i = 0; i < width; ++i) {
        const float code = std::rint(x[i] / divisor);
        packed[i] = static_cast<int8_t>(code >= 127.0f ? 127.0f : code >= -127.0f ? code : -127.0f);
    }
    packed[width] = static_cast<int8_t>(bits & 255u);
    packed[width + 1] = static_cast<int8_t>(bits >> 8);
}

}  // namespace

extern "C" int patchkit_kv_int8_write(int8_t* keys, int8_t* values, const float* new_keys, const float* new_values, const int64_t* slots,
                                      const int64_t* offsets, const float* coarse, const float* fine, const int64_t* n) {
    const int64_t batch = n[0], groups = n[1], count = n[2], room = n[3], k = n[4], v = n[5], pairs = n[6], start = n[7];
    const bool interleaved = n[8] != 0;
    float cosine[kMost], sine[kMost], key[kMost];
    for (int64_t i = 0; i < batch * groups * count; ++i) {
        const int64_t t = i % count, head = i / count, b = head / groups;
        angles_at(offsets[b * n[9] + t], coarse, fine, pairs, cosine, sine);
        std::memcpy(key, new_keys + i * k, k * sizeof(float));
        for (int64_t p = 0; p < pairs; ++p) {
            const int64_t one = interleaved ? start + 2 * p : start + p, two = interleaved ? one + 1 : one + pairs;
            const float x = key[one], y = key[two];
            key[one] = x * cosine[p] + y * sine[p];
            key[two] = y * cosine[p] - x * sine[p];
        }
        pack(key, k, keys + (head * room + slots[t]) * (k + 2));
        pack(new_values + i * v, v, values + (head * room + slots[t]) * (v + 2));
    }
    return 0;
}
