// Sixteen floats at once, and e^x for one float and for sixteen in operations that every vector unit has (libm's is a
// call).
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial, whose next term is below 2^-27: 2 units in the
// last place for -87 <= x <= 0. Below that the result is e^-87, above it is wrong, and NaN stays NaN.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define DETR_FAST_HAS_FLOATS 1
// Without inlining, how a vector is passed would depend on the processor.
#define DETR_FAST_INLINE inline __attribute__((always_inline))
#else
#define DETR_FAST_INLINE inline
#endif

namespace detr_fast {
namespace exponential {

constexpr float lowest = -87.0f;  // e^-87 is still a normal number
// 1.5 * 2^23: a float near it has no bits for a fraction, so that adding it rounds to an integer, and that integer
// stands in the lowest bits of the sum.
constexpr float rounder = 12582912.0f;
constexpr float log2_e = 1.44269504089f;
constexpr float ln2_high = 0.693145751953125f;  // few bits: n times it is exact
constexpr float ln2_low = 1.42860682030941723e-6f;

template <typename Number>
DETR_FAST_INLINE Number taylor(Number r) {
    Number p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    return p * r + 1.0f;
}

}  // namespace exponential

inline float exp_of_nonpositive(float x) {
    using namespace exponential;
    x = x < lowest ? lowest : x;
    const float shifted = x * log2_e + rounder;
    const float n = shifted - rounder;
    const float r = (x - n * ln2_high) - n * ln2_low;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return taylor(r) * power;
}

inline double exp_of_nonpositive(double x) {
    return std::exp(x);
}

#if defined(DETR_FAST_HAS_FLOATS)
// GCC and Clang split a vector of sixteen into the registers of the processor that a function is compiled for.
typedef float Floats __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));
typedef float QuarterFloats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(64)));
constexpr int64_t num_floats = 16;

DETR_FAST_INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

DETR_FAST_INLINE Floats exp_of_nonpositive(Floats x) {
    using namespace exponential;
    x = x < lowest ? Floats{} + lowest : x;
    const Floats shifted = x * log2_e + rounder;
    const Floats n = shifted - rounder;
    const Floats r = (x - n * ln2_high) - n * ln2_low;
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127u) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof(power));
    return taylor(r) * power;
}

struct Higher {
    template <typename Number>
    DETR_FAST_INLINE Number operator()(Number a, Number b) const {
        return a > b ? a : b;
    }
};

struct Add {
    template <typename Number>
    DETR_FAST_INLINE Number operator()(Number a, Number b) const {
        return a + b;
    }
};

// Halves a vector until four numbers are left; combine(a, b) works on vectors and on numbers.
template <typename Combine>
DETR_FAST_INLINE float reduce(Floats x, Combine combine) {
    HalfFloats half[2];
    std::memcpy(half, &x, sizeof(half));
    const HalfFloats eight = combine(half[0], half[1]);
    QuarterFloats quarter[2];
    std::memcpy(quarter, &eight, sizeof(quarter));
    const QuarterFloats four = combine(quarter[0], quarter[1]);
    return combine(combine(four[0], four[2]), combine(four[1], four[3]));
}

#endif

}  // namespace detr_fast
