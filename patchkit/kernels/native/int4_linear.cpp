// int4_linear for any number of rows: quantise the rows of x, multiply integers, scale per group, in one pass over the weights.
//
// x [rows, k] fp32, weight: blocks in memory order (below), unit [n] fp32, bias [n] fp32 or null, y [rows, n] fp32.
// A block has a group of inputs of 16 outputs: 16 scales and, if not symmetric, 16 minima in fp16, then group / 8 times 64 bytes. Of these
// 64 bytes, byte 4 o + j holds input j of output o in its low half, and input 4 + j in its high half. So the weights are one stream, every
// output is a lane, and no sum over lanes is needed.
//
// Activations become integers per row and group, of 8 bits (planes = 1) or of 16 (planes = 2: value = 256 * high + low). Products are
// of unsigned 4 bits times signed 8 bits; their sums over a group are exact. Groups are added in fp32, in order, one fused
// multiply-add each. So a row's result does not depend on the other rows, nor on the instructions: AVX-512 VNNI, AVX2 or plain C++.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kOutputs = 16;     // outputs of a block, one per lane
constexpr int64_t kChunk = 64;       // bytes that hold 8 inputs of 16 outputs
constexpr int64_t kExact = 32;       // inputs whose products the intermediate sums hold
constexpr int64_t kAhead = 4096;     // bytes of the weight asked for in advance
constexpr int64_t kRowsAtOnce = 256; // rows that are quantised together

enum Level { kPlain = 1, kAvx2 = 2, kVnni = 3 };

// Four bytes, which are broadcast to all lanes as they are loaded.
inline int32_t four(const int8_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int kLevel = kVnni;
constexpr int kMostStreams = 8;  // rows times planes whose sums fit the registers
using Nibbles = __m512i;
using Sums = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Nibbles low(const uint8_t* p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15)); }
inline Nibbles high(const uint8_t* p) { return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15)); }
inline Ints splat(int32_t v) { return _mm512_set1_epi32(v); }
inline Sums begin(Ints total) { return total; }
inline void dot(Sums& sums, Nibbles w, const int8_t* x) { sums = _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(four(x))); }
inline Ints end(Ints, Sums sums) { return sums; }
inline Ints joined(Ints low, Ints high) { return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8)); }
inline Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Floats widen(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void ask(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kLevel = kAvx2;
constexpr int kMostStreams = 2;
struct Nibbles {
    __m256i a, b;
};
using Sums = Nibbles;
using Ints = Nibbles;
struct Floats {
    __m256 a, b;
};

inline __m256i half(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i shifted(__m256i v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
inline Nibbles low(const uint8_t* p) {
    return {_mm256_and_si256(half(p), _mm256_set1_epi8(15)), _mm256_and_si256(half(p + 32), _mm256_set1_epi8(15))};
}
inline Nibbles high(const uint8_t* p) { return {shifted(half(p)), shifted(half(p + 32))}; }
inline Ints splat(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Sums begin(Ints) { return splat(0); }
// Sums in 16 bits: 2 * 15 * 128 per call, and 8 calls between `begin` and `end`, are at most 30720.
inline void dot(Sums& sums, Nibbles w, const int8_t* x) {
    const __m256i v = _mm256_set1_epi32(four(x));
    sums.a = _mm256_add_epi16(sums.a, _mm256_maddubs_epi16(w.a, v));
    sums.b = _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(w.b, v));
}
inline Ints end(Ints total, Sums sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(total.a, _mm256_madd_epi16(sums.a, ones)), _mm256_add_epi32(total.b, _mm256_madd_epi16(sums.b, ones))};
}
inline Ints joined(Ints low, Ints high) {
    return {_mm256_add_epi32(low.a, _mm256_slli_epi32(high.a, 8)), _mm256_add_epi32(low.b, _mm256_slli_epi32(high.b, 8))};
}
inline Floats floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline Floats all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Floats widen(const uint8_t* p) {
    const auto* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline Floats times(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats fused(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline void store(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline void ask(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

#else

constexpr int kLevel = kPlain;
constexpr int kMostStreams = 1;
struct Nibbles {
    uint8_t v[kChunk];
};
struct Ints {
    int32_t v[kOutputs];
};
using Sums = Ints;
struct Floats {
    float v[kOutputs];
};

inline Nibbles low(const uint8_t* p) {
    Nibbles r;
    for (int64_t i = 0; i < kChunk; ++i) r.v[i] = p[i] & 15;
    return r;
}
inline Nibbles high(const uint8_t* p) {
    Nibbles r;
    for (int64_t i = 0; i < kChunk; ++i) r.v[i] = p[i] >> 4;
    return r;
}
inline Ints splat(int32_t v) {
    Ints r;
    for (auto& each : r.v) each = v;
    return r;
}
inline Sums begin(const Ints& total) { return total; }
inline void dot(Sums& sums, const Nibbles& w, const int8_t* x) {
    for (int64_t o = 0; o < kOutputs; ++o) {
        for (int64_t j = 0; j < 4; ++j) sums.v[o] += int32_t(w.v[4 * o + j]) * x[j];
    }
}
inline Ints end(const Ints&, const Sums& sums) { return sums; }
inline Ints joined(Ints low, const Ints& high) {
    for (int64_t o = 0; o < kOutputs; ++o) low.v[o] += 256 * high.v[o];
    return low;
}
inline Floats floats(const Ints& v) {
    Floats r;
    for (int64_t o = 0; o < kOutputs; ++o) r.v[o] = static_cast<float>(v.v[o]);
    return r;
}
inline Floats all(float v) {
    Floats r;
    for (auto& each : r.v) each = v;
    return r;
}
inline float single(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24) : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
    return half >> 15 ? -value : value;
}
inline Floats widen(const uint8_t* p) {
    Floats r;
    for (int64_t o = 0; o < kOutputs; ++o) {
        uint16_t half;
        std::memcpy(&half, p + 2 * o, 2);
        r.v[o] = single(half);
    }
    return r;
}
inline Floats times(const Floats& a, const Floats& b) {
    Floats r;
    for (int64_t o = 0; o < kOutputs; ++o) r.v[o] = a.v[o] * b.v[o];
    return r;
}
inline Floats fused(const Floats& a, const Floats& b, const Floats& c) {
    Floats r;
    for (int64_t o = 0; o < kOutputs; ++o) r.v[o] = std::fma(a.v[o], b.v[o], c.v[o]);
    return r;
}
inline void store(float* p, const Floats& v) { std::memcpy(p, v.v, sizeof v.v); }
inline void ask(const uint8_t*) {}

#endif

// The rows of x as integers. Of each row: planes times `padded` bytes, then a step, a sum times step, and a sum for each group.
struct Rows {
    int64_t k, padded, group, groups, planes;
    int8_t* bytes;
    float* steps;
    float* shifts;
    int32_t* sums;

    void quantise(int64_t row, const float* x) const {
        int8_t* out = bytes + row * planes * padded;
        std::memset(out, 0, planes * padded);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * group, count = k - first < group ? k - first : group;
            const float* from = x + first;
            float largest = 0.0f;
            bool finite = true;
            for (int64_t i = 0; i < count; ++i) {
                const float magnitude = std::fabs(from[i]);
                finite &= magnitude <= 3.402823466e38f;
                largest = magnitude > largest ? magnitude : largest;
            }
            int32_t sum = 0;
            float step = NAN;  // an inf or a NaN anywhere shows in the whole row
            if (finite) {
                if (largest < 1.17549435e-38f) largest = 1.17549435e-38f;
                step = largest / (planes == 1 ? 127.0f : 32639.0f);
                int8_t* lows = out + first;
                if (planes == 1) {
                    for (int64_t i = 0; i < count; ++i) {
                        const auto whole = static_cast<int32_t>(std::nearbyintf(from[i] / step));
                        lows[i] = static_cast<int8_t>(whole);
                        sum += whole;
                    }
                } else {
                    int8_t* highs = lows + padded;
                    for (int64_t i = 0; i < count; ++i) {
                        const auto whole = static_cast<int32_t>(std::nearbyintf(from[i] / step));
                        const int32_t above = (whole + 128) >> 8;
                        lows[i] = static_cast<int8_t>(whole - 256 * above);
                        highs[i] = static_cast<int8_t>(above);
                        sum += whole;
                    }
                }
            }
            steps[row * groups + g] = step;
            shifts[row * groups + g] = step * static_cast<float>(sum);
            sums[row * groups + g] = sum;
        }
    }
};

template <int kPlanes, int kRows, bool kSymmetric>
void tile(const Rows& x, int64_t row, const uint8_t* weight, const float* unit, const float* bias, int64_t count, float* y, int64_t n) {
    const int64_t heading = (kSymmetric ? 1 : 2) * 2 * kOutputs;
    const int8_t* bytes = x.bytes + row * kPlanes * x.padded;
    Floats results[kRows];
    for (int r = 0; r < kRows; ++r) results[r] = all(0.0f);
    for (int64_t g = 0; g < x.groups; ++g) {
        const uint8_t* chunk = weight + heading;
        Ints totals[kRows][kPlanes];
        for (int r = 0; r < kRows; ++r) {
            for (int p = 0; p < kPlanes; ++p) totals[r][p] = splat(0);
            // Levels -8 to 7 are stored as 0 to 15.
            if (kSymmetric) totals[r][0] = splat(-8 * x.sums[(row + r) * x.groups + g]);
        }
        for (int64_t i = 0; i < x.group; i += kExact) {
            Sums sums[kRows][kPlanes];
            for (int r = 0; r < kRows; ++r) {
                for (int p = 0; p < kPlanes; ++p) sums[r][p] = begin(totals[r][p]);
            }
            for (int64_t j = 0; j < kExact; j += 8, chunk += kChunk) {
                // In the order of memory, which is what the processor's own prefetcher follows; into the second cache.
                ask(chunk + kAhead);
                const Nibbles first = low(chunk), second = high(chunk);
                for (int r = 0; r < kRows; ++r) {
                    for (int p = 0; p < kPlanes; ++p) {
                        const int8_t* inputs = bytes + (r * kPlanes + p) * x.padded + g * x.group + i + j;
                        dot(sums[r][p], first, inputs);
                        dot(sums[r][p], second, inputs + 4);
                    }
                }
            }
            for (int r = 0; r < kRows; ++r) {
                for (int p = 0; p < kPlanes; ++p) totals[r][p] = end(totals[r][p], sums[r][p]);
            }
        }
        const Floats scale = widen(weight);
        for (int r = 0; r < kRows; ++r) {
            const int64_t at = (row + r) * x.groups + g;
            const Floats sum = floats(kPlanes == 1 ? totals[r][0] : joined(totals[r][0], totals[r][kPlanes - 1]));
            results[r] = fused(sum, times(scale, all(x.steps[at])), results[r]);
            if (!kSymmetric) results[r] = fused(widen(weight + 2 * kOutputs), all(x.shifts[at]), results[r]);
        }
        weight = chunk;
    }
    for (int r = 0; r < kRows; ++r) {
        float values[kOutputs];
        store(values, results[r]);
        float* to = y + (row + r) * n;
        for (int64_t o = 0; o < count; ++o) to[o] = bias == nullptr ? values[o] * unit[o] : values[o] * unit[o] + bias[o];
    }
}

template <int kPlanes, bool kSymmetric>
void outputs(const Rows& x, int64_t rows, const uint8_t* w, const float* unit, const float* bias, int64_t count, float* y, int64_t n) {
    constexpr int kMost = kMostStreams / kPlanes > 0 ? kMostStreams / kPlanes : 1;
    for (int64_t row = 0; row < rows; row += kMost) {
        switch (rows - row < kMost ? rows - row : kMost) {
            case 1: tile<kPlanes, 1, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            case 2: tile<kPlanes, kMost < 2 ? kMost : 2, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            case 3: tile<kPlanes, kMost < 3 ? kMost : 3, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            case 4: tile<kPlanes, kMost < 4 ? kMost : 4, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            case 5: tile<kPlanes, kMost < 5 ? kMost : 5, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            case 6: tile<kPlanes, kMost < 6 ? kMost : 6, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            case 7: tile<kPlanes, kMost < 7 ? kMost : 7, kSymmetric>(x, row, w, unit, bias, count, y, n); break;
            default: tile<kPlanes, kMost, kSymmetric>(x, row, w, unit, bias, count, y, n);
        }
    }
}

}  // namespace

// Without rows, the level of instructions that it was compiled for. 0: done; -1: no memory for the quantised activations.
extern "C" int patchkit_int4_linear(const float* x, const uint8_t* weight, const float* unit, const float* bias, float* y, int64_t rows,
                                    int64_t n, int64_t k, int group, int symmetric, int planes, int threads) {
    if (rows == 0) return kLevel;
    Rows quantised{};
    quantised.k = k;
    quantised.group = group;
    quantised.groups = (k + group - 1) / group;
    quantised.padded = quantised.groups * group;
    quantised.planes = planes;
    const int64_t together = rows < kRowsAtOnce ? rows : kRowsAtOnce;
    const int64_t facts = together * quantised.groups;
    const int64_t bytes = (together * planes * quantised.padded + 63) / 64 * 64;
    auto* memory = static_cast<int8_t*>(std::malloc(bytes + 12 * facts));
    if (memory == nullptr) return -1;
    quantised.bytes = memory;
    quantised.steps = reinterpret_cast<float*>(memory + bytes);
    quantised.shifts = quantised.steps + facts;
    quantised.sums = reinterpret_cast<int32_t*>(quantised.shifts + facts);
    const int64_t blocks = (n + kOutputs - 1) / kOutputs;
    const int64_t stride = quantised.groups * ((symmetric ? 1 : 2) * 2 * kOutputs + kOutputs * group / 2);
    for (int64_t from = 0; from < rows; from += kRowsAtOnce) {
        const int64_t count = rows - from < kRowsAtOnce ? rows - from : kRowsAtOnce;
        const float* given = x + from * k;
        float* wanted = y + from * n;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 8)
        for (int64_t row = 0; row < count; ++row) quantised.quantise(row, given + row * k);
        // Each thread reads one contiguous part of the weights.
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int t = 0; t < threads; ++t) {
            for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; ++b) {
                const int64_t o = b * kOutputs, valid = n - o < kOutputs ? n - o : kOutputs;
                const float* shift = bias == nullptr ? nullptr : bias + o;
                const uint8_t* w = weight + b * stride;
                if (planes == 1 && symmetric) outputs<1, true>(quantised, count, w, unit + o, shift, valid, wanted + o, n);
                else if (planes == 1) outputs<1, false>(quantised, count, w, unit + o, shift, valid, wanted + o, n);
                else if (symmetric) outputs<2, true>(quantised, count, w, unit + o, shift, valid, wanted + o, n);
                else outputs<2, false>(quantised, count, w, unit + o, shift, valid, wanted + o, n);
            }
        }
    }
    std::free(memory);
    return 0;
}
