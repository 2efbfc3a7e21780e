// gemv: a linear layer of up to 16 rows in one pass over its weights, for a processor with AVX-512, or AVX2 with FMA and F16C.
//
// x [rows, k] fp32, weight [n, k] fp32, bf16 or fp16, bias [n] fp32 or null, y [rows, n] fp32.
// Every output is one sum over k in lanes of a vector, added up at the end, so a row's result does not depend on how many rows there are.

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))

namespace {

constexpr int64_t kAhead = 4096;   // bytes beyond the next outputs' weights that are asked for in advance
constexpr int64_t kMostRows = 16;
constexpr int64_t kPass = 8;       // rows whose sums fit the registers
constexpr int64_t kOutputs = 64;   // outputs whose weights stay in the second cache for another pass

enum Kind { kFloat = 0, kBfloat16 = 1, kFloat16 = 2 };

template <Kind kind>
struct Stored {
    using type = uint16_t;
};
template <>
struct Stored<kFloat> {
    using type = float;
};

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;
using Vector = __m512;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector fused(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

template <Kind kind>
inline Vector widen(const typename Stored<kind>::type* p);
template <>
inline Vector widen<kFloat>(const float* p) {
    return _mm512_loadu_ps(p);
}
template <>
inline Vector widen<kBfloat16>(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
template <>
inline Vector widen<kFloat16>(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#else

constexpr int64_t kLanes = 8;
using Vector = __m256;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector fused(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline float total(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <Kind kind>
inline Vector widen(const typename Stored<kind>::type* p);
template <>
inline Vector widen<kFloat>(const float* p) {
    return _mm256_loadu_ps(p);
}
template <>
inline Vector widen<kBfloat16>(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
template <>
inline Vector widen<kFloat16>(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#endif

// The last k % kLanes inputs, in a vector filled up with zeros.
template <typename T>
inline void last(const T* from, int64_t count, T* to) {
    for (int64_t i = 0; i < kLanes; ++i) to[i] = i < count ? from[i] : T(0);
}

template <Kind kind, int kRows, int kShared>
inline void tile(const float* x, const typename Stored<kind>::type* weight, const float* bias, int64_t k, float* y, int64_t n) {
    using T = typename Stored<kind>::type;
    Vector sums[kRows][kShared];
    for (int r = 0; r < kRows; ++r) {
        for (int o = 0; o < kShared; ++o) sums[r][o] = zero();
    }
    const auto add = [&](const T* const* from, const float* const* rows) {
        Vector w[kShared];
        for (int o = 0; o < kShared; ++o) w[o] = widen<kind>(from[o]);
        for (int r = 0; r < kRows; ++r) {
            const Vector v = load(rows[r]);
            for (int o = 0; o < kShared; ++o) sums[r][o] = fused(v, w[o], sums[r][o]);
        }
    };
    const T* from[kShared];
    const float* rows[kRows];
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        for (int o = 0; o < kShared; ++o) {
            from[o] = weight + o * k + i;
            // In the order of memory, which is what the processor's own prefetcher follows; reading several outputs' weights side by
            // side is not. Into the second cache: asked for into the first, 8 rows took twice the time.
            const T* ahead = weight + kShared * k + i * kShared + o * kLanes;
            _mm_prefetch(reinterpret_cast<const char*>(ahead) + kAhead, _MM_HINT_T1);
        }
        for (int r = 0; r < kRows; ++r) rows[r] = x + r * k + i;
        add(from, rows);
    }
    if (i < k) {
        T w[kShared][kLanes];
        float v[kRows][kLanes];
        for (int o = 0; o < kShared; ++o) {
            last(weight + o * k + i, k - i, w[o]);
            from[o] = w[o];
        }
        for (int r = 0; r < kRows; ++r) {
            last(x + r * k + i, k - i, v[r]);
            rows[r] = v[r];
        }
        add(from, rows);
    }
    for (int r = 0; r < kRows; ++r) {
        for (int o = 0; o < kShared; ++o) y[r * n + o] = total(sums[r][o]) + (bias == nullptr ? 0.0f : bias[o]);
    }
}

template <Kind kind, int kRows, int kShared>
void outputs(const float* x, const void* weight, const float* bias, float* y, int64_t n, int64_t k, int64_t begin, int64_t end) {
    const auto* w = static_cast<const typename Stored<kind>::type*>(weight);
    int64_t o = begin;
    for (; o + kShared <= end; o += kShared) {
        tile<kind, kRows, kShared>(x, w + o * k, bias == nullptr ? nullptr : bias + o, k, y + o, n);
    }
    for (; o < end; ++o) tile<kind, kRows, 1>(x, w + o * k, bias == nullptr ? nullptr : bias + o, k, y + o, n);
}

// Outputs that share each load of x: as many as the registers hold.
template <Kind kind>
void pass(int64_t rows, const float* x, const void* w, const float* b, float* y, int64_t n, int64_t k, int64_t begin, int64_t end) {
    switch (rows) {
        case 1: return outputs<kind, 1, 4>(x, w, b, y, n, k, begin, end);
        case 2: return outputs<kind, 2, 4>(x, w, b, y, n, k, begin, end);
        case 3: return outputs<kind, 3, 4>(x, w, b, y, n, k, begin, end);
        case 4: return outputs<kind, 4, 4>(x, w, b, y, n, k, begin, end);
        case 5: return outputs<kind, 5, 4>(x, w, b, y, n, k, begin, end);
        case 6: return outputs<kind, 6, 4>(x, w, b, y, n, k, begin, end);
        case 7: return outputs<kind, 7, 3>(x, w, b, y, n, k, begin, end);
        case 8: return outputs<kind, 8, 3>(x, w, b, y, n, k, begin, end);
    }
}

template <Kind kind>
void all_rows(int64_t rows, const float* x, const void* w, const float* b, float* y, int64_t n, int64_t k, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o += kOutputs) {
        const int64_t stop = o + kOutputs < end ? o + kOutputs : end;
        for (int64_t r = 0; r < rows; r += kPass) {
            pass<kind>(rows - r < kPass ? rows - r : kPass, x + r * k, w, b, y + r * n, n, k, o, stop);
        }
    }
}

}  // namespace

extern "C" int patchkit_gemv(const float* x, const void* weight, const float* bias, float* y, int64_t rows, int64_t n, int64_t k, int kind,
                             int threads) {
    if (rows < 0 || rows > kMostRows) return 1;
    // Each thread reads one contiguous part of the weights.
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
        switch (kind) {
            case kFloat: all_rows<kFloat>(rows, x, weight, bias, y, n, k, begin, end); break;
            case kBfloat16: all_rows<kBfloat16>(rows, x, weight, bias, y, n, k, begin, end); break;
            default: all_rows<kFloat16>(rows, x, weight, bias, y, n, k, begin, end);
        }
    }
    return 0;
}

#else

extern "C" int patchkit_gemv(const float*, const void*, const float*, float*, int64_t, int64_t, int64_t, int, int) { return 2; }

#endif
