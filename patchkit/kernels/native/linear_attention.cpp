// linear_attention in one pass: features, products within a chunk, the state, and the division, with all of a chunk in the cache.
//
// q [batch, heads, tokens, width], k [batch, groups, tokens, width], v [batch, groups, tokens, value_width] fp32 with any strides but 1
// in the last dimension; mask [batch, tokens] bytes or null; first_state and state [batch, groups, width, value_width], first_normalizer
// and normalizer [batch, groups, width], before (null: zeros) and after; out [batch, heads, tokens, value_width] and denominator
// [batch, heads, tokens]; all fp32.
// For a chunk with features Q and K (both [chunk, width]) and values V: out = tril(Q K^T) V + Q S, then S += K^T V.
// Every head is computed by one thread, by the same operations in the same order whatever the number of threads.

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
using Vector = __m512;
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
inline Vector same(float x) { return _mm512_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector column(const float* p, int stride) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_i32gather_ps(_mm512_mullo_epi32(lane, _mm512_set1_epi32(stride)), p, 4);
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
using Vector = __m256;
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
inline Vector same(float x) { return _mm256_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector column(const float* p, int stride) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_i32gather_ps(p, _mm256_mullo_epi32(lane, _mm256_set1_epi32(stride)), 4);
}
#else
#error "linear_attention needs AVX2 and FMA"
#endif

typedef int32_t Integers __attribute__((vector_size(sizeof(Vector))));

constexpr int kChunk = 64;
constexpr int kStride = 256 + kLanes;  // between rows of at most 256 features, so that a column does not fall into one cache set
constexpr int kRows = 8;  // of a tile of a product, which stays in registers
constexpr int kVectors = kLanes == 16 ? 2 : 1;  // of a row of a tile

enum Map { kIdentity, kElu1, kRelu };

// e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2, and a polynomial for e^r (Cephes).
inline Vector exponential(Vector x) {
    x = x < same(-87.0f) ? same(-87.0f) : x;
    // The sum is rounded to an integer, which its last bits are.
    const Vector shifted = multiply_add(x, same(1.44269504f), same(12582912.0f)), n = shifted - same(12582912.0f);
    const Vector r = multiply_add(n, same(2.12194440e-4f), multiply_add(n, same(-0.693359375f), x));
    Vector y = same(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) {
        y = multiply_add(y, r, same(c));
    }
    return y * (Vector)(((Integers)shifted << 23) + (127 << 23));
}

// features [width], and zeros up to the next multiple of the lanes.
inline void map_row(const float* x, int64_t width, int map, float* features) {
    std::memcpy(features, x, width * sizeof(float));
    const Vector zero = same(0.0f);
    for (int64_t i = 0; i < width && map != kIdentity; i += kLanes) {
        const Vector f = load(features + i);
        // Comparisons are false for a NaN, which so comes out as one.
        store(features + i, map == kRelu ? (f < zero ? zero : f) : (f < zero ? exponential(f) : f + same(1.0f)));
    }
    for (int64_t i = width; i % kLanes != 0; ++i) features[i] = 0.0f;
}

// c [kRows, N vectors] = a [kRows, depth] b [depth, N vectors], added to what is there if `add`.
template <int N>
inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add) {
    Vector sums[kRows][N];
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < N; ++j) sums[i][j] = add ? load(c + i * c_row + j * kLanes) : same(0.0f);
    }
    for (int64_t p = 0; p < depth; ++p) {
        Vector of_b[N];
        for (int j = 0; j < N; ++j) of_b[j] = load(b + p * b_row + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const Vector of_a = same(a[i * a_row + p]);
            for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(of_a, of_b[j], sums[i][j]);
        }
    }
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < N; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
    }
}

// c [kRows, columns] of the product, columns being a multiple of the lanes.
inline void strip(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, int64_t columns, bool add) {
    int64_t j = 0;
    for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes) tile<kVectors>(a, a_row, b + j, b_row, depth, c + j, c_row, add);
    for (; j < columns; j += kLanes) tile<1>(a, a_row, b + j, b_row, depth, c + j, c_row, add);
}

inline int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Buffers {
    float *queries, *keys, *values, *weights, *out, *state, *normalizer;
};

}  // namespace

// sizes: batch, heads, groups, tokens, width, value_width; strides: of q, k and v, three each.
extern "C" int patchkit_linear_attention(
    const float* q, const float* k, const float* v, const uint8_t* mask, const float* first_state, const float* first_normalizer,
    float* out, float* denominator, float* state, float* normalizer,
    const int64_t* sizes, const int64_t* strides, int map, int normalize, int threads) {
    const int64_t heads = sizes[1], groups = sizes[2], tokens = sizes[3], width = sizes[4], value_width = sizes[5];
    const int64_t shared = heads / groups, wide = up(width, kLanes), value_wide = up(value_width, kLanes), tall = up(width, kRows);
    // Heads that share a state are shared out among threads where there are too few states; each part computes the state for itself.
    const int64_t states = sizes[0] * groups, parts = states >= threads ? 1 : (threads / states < shared ? threads / states : shared);
    const int64_t floats = kChunk * wide + tall * kChunk + 2 * kChunk * value_wide + kChunk * kChunk + tall * value_wide + wide;
    const int64_t each = up(floats * sizeof(float), 64) / sizeof(float);
    auto* memory = static_cast<float*>(std::aligned_alloc(64, threads * each * sizeof(float)));
    if (memory == nullptr) return 1;

#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < states * parts; ++task) {
        const int64_t pair = task / parts, part = task % parts, b = pair / groups, g = pair % groups;
        float* const base = memory + omp_get_thread_num() * each;
        Buffers x;
        x.queries = base;
        x.keys = x.queries + kChunk * wide;  // transposed: [width, chunk]
        x.values = x.keys + tall * kChunk;
        x.out = x.values + kChunk * value_wide;
        x.weights = x.out + kChunk * value_wide;
        x.state = x.weights + kChunk * kChunk;
        x.normalizer = x.state + tall * value_wide;
        std::memset(base, 0, floats * sizeof(float));
        const int64_t row = value_width * sizeof(float);
        for (int64_t f = 0; f < width && first_state != nullptr; ++f) {
            std::memcpy(x.state + f * value_wide, first_state + (pair * width + f) * value_width, row);
        }
        if (first_normalizer != nullptr) std::memcpy(x.normalizer, first_normalizer + pair * width, width * sizeof(float));

        for (int64_t start = 0; start < tokens; start += kChunk) {
            const int64_t count = tokens - start < kChunk ? tokens - start : kChunk;
            const int64_t rows = up(count, kRows), columns = up(count, kLanes);
            float mapped[kLanes][kStride], sums[kStride];
            std::memcpy(sums, x.normalizer, wide * sizeof(float));
            for (int64_t first = 0; first < columns; first += kLanes) {
                for (int64_t t = first; t < first + kLanes; ++t) {
                    const bool real = t < count && (mask == nullptr || mask[b * tokens + start + t]);
                    if (real) map_row(k + b * strides[3] + g * strides[4] + (start + t) * strides[5], width, map, mapped[t - first]);
                    else std::memset(mapped[t - first], 0, width * sizeof(float));
                }
                for (int64_t f = 0; f < width; ++f) store(x.keys + f * kChunk + first, column(&mapped[0][f], kStride));
                for (int64_t t = 0; t < kLanes; ++t) {
                    for (int64_t f = 0; f < width; ++f) sums[f] += mapped[t][f];
                }
            }
            for (int64_t t = 0; t < count; ++t) {
                std::memcpy(x.values + t * value_wide, v + b * strides[6] + g * strides[7] + (start + t) * strides[8], row);
            }
            for (int64_t h = g * shared + part; h < (g + 1) * shared; h += parts) {
                const float* const of_head = q + b * strides[0] + h * strides[1] + start * strides[2];
                for (int64_t t = 0; t < count; ++t) map_row(of_head + t * strides[2], width, map, x.queries + t * wide);
                for (int64_t t = count; t < rows; ++t) std::memset(x.queries + t * wide, 0, width * sizeof(float));
                float* const to = out + ((b * heads + h) * tokens + start) * value_width;
                float* const to_denominator = denominator + (b * heads + h) * tokens + start;
                for (int64_t t = 0; t < rows; t += kRows) {
                    // Weights of a row are 0 after its own token; products stop after the last row's.
                    const float* const queries = x.queries + t * wide;
                    float* const weights = x.weights + t * kChunk;
                    const int64_t seen = t + kRows < count ? t + kRows : count;
                    strip(queries, wide, x.keys, kChunk, width, weights, kChunk, up(seen, kLanes), false);
                    for (int64_t i = 0; i < kRows; ++i) {
                        for (int64_t j = t + i + 1; j < up(seen, kLanes); ++j) weights[i * kChunk + j] = 0.0f;
                    }
                    float* const result = x.out + t * value_wide;
                    strip(weights, kChunk, x.values, value_wide, seen, result, value_wide, value_wide, false);
                    strip(queries, wide, x.state, value_wide, width, result, value_wide, value_wide, true);
                    for (int64_t i = 0; i < kRows && t + i < count; ++i) {
                        Vector total = same(0.0f);
                        for (int64_t j = 0; j < wide; j += kLanes) total = multiply_add(load(queries + i * wide + j), load(x.normalizer + j), total);
                        for (int64_t j = 0; j < seen; j += kLanes) total = multiply_add(load(weights + i * kChunk + j), same(1.0f), total);
                        float partial[kLanes];
                        store(partial, total);
                        float sum = 0.0f;
                        for (int64_t lane = 0; lane < kLanes; ++lane) sum += partial[lane];
                        to_denominator[t + i] = sum;
                        const float divisor = normalize ? sum : 1.0f;
                        for (int64_t j = 0; j < value_width; ++j)
                            to[(t + i) * value_width + j] = divisor == 0.0f ? 0.0f : result[i * value_wide + j] / divisor;
                    }
                }
            }
            for (int64_t f = 0; f < tall; f += kRows) {
                strip(x.keys + f * kChunk, kChunk, x.values, value_wide, count, x.state + f * value_wide, value_wide, value_wide, true);
            }
            std::memcpy(x.normalizer, sums, wide * sizeof(float));
        }
        if (part == 0) {
            for (int64_t f = 0; f < width; ++f) std::memcpy(state + (pair * width + f) * value_width, x.state + f * value_wide, row);
            std::memcpy(normalizer + pair * width, x.normalizer, width * sizeof(float));
        }
    }
    std::free(memory);
    return 0;
}
