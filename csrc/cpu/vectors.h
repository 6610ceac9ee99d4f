// Vectors of numbers, written for registers of any width, and e^x and log(1 + x) in operations that every vector
// unit has (libm's are calls).
//
// Widths are template arguments, because a vector wider than the processor's registers is no way to be independent of
// them: GCC takes it apart number by number where it is compared or shuffled. widths.h runs a task at the widest.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 2^(r / ln 2) by the polynomial of degree 6 whose largest relative
// error is smallest, 2e-9: 2 units in the last place for -87 <= x <= 0. Below that the result is e^-87, above it is
// wrong, and NaN stays NaN.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__GNUC__)
#define DETR_FAST_HAS_VECTORS 1
// Without inlining, how a vector is passed would depend on the processor.
#define DETR_FAST_INLINE inline __attribute__((always_inline))
#else
#define DETR_FAST_INLINE inline
#endif

namespace detr_fast {
namespace exponential {

constexpr float lowest = -87.0f;  // e^-87 is still a normal number
constexpr float log2_e = 1.44269504089f;
// 1.5 * 2^23: a float near it has no bits for a fraction, so that adding it rounds to an integer, and that integer
// stands in the lowest bits of the sum. With 127 more, so does the exponent of 2^n.
constexpr float rounder = 12582912.0f + 127.0f;

template <typename Number>
DETR_FAST_INLINE Number power_of_two(Number f) {
    Number p = f * 0.0001534581242594868f + 0.0013399930903688073f;
    p = p * f + 0.009618489071726799f;
    p = p * f + 0.05550328642129898f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    return p * f + 1.0f;
}

// Number is float or a vector of floats, Bits as many unsigned integers.
template <typename Bits, typename Number>
DETR_FAST_INLINE Number exp_of_nonpositive(Number x) {
    const Number floor = Number{} + lowest;
    x = floor > x ? floor : x;  // in this order NaN stays, and it is one instruction
    const Number shifted = x * log2_e + rounder;
    const Number fraction = x * log2_e - (shifted - rounder);
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits <<= 23;
    Number power;
    std::memcpy(&power, &bits, sizeof(power));
    return power_of_two(fraction) * power;
}

}  // namespace exponential

inline float exp_of_nonpositive(float x) {
    return exponential::exp_of_nonpositive<uint32_t>(x);
}

inline double exp_of_nonpositive(double x) {
    return std::exp(x);
}

// log(1 + e) for e in [0, 1]: 2 atanh(z) with z = e / (2 + e) <= 1/3. Eight terms of the series; the ninth is below
// 2^-29 of the sum.
template <typename Number>
DETR_FAST_INLINE Number log_of_one_plus(Number e) {
    const Number z = e / (e + 2.0f);
    const Number s = z * z;
    Number p = s * (1.0f / 15.0f) + 1.0f / 13.0f;
    p = p * s + 1.0f / 11.0f;
    p = p * s + 1.0f / 9.0f;
    p = p * s + 1.0f / 7.0f;
    p = p * s + 1.0f / 5.0f;
    p = p * s + 1.0f / 3.0f;
    return (z + z) * (p * s + 1.0f);
}

// log(x) of a normal positive number: x = 2^n m with m in [1/sqrt 2, sqrt 2), and log m = 2 atanh(z) with
// z = (m - 1) / (m + 1), |z| < 0.172. Five terms of the series; the sixth is below 2^-30 of the sum.
inline float log_of_normal(float x) {
    constexpr uint32_t of_root_half = 0x3f3504f3;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t above = bits - of_root_half;
    const uint32_t mantissa = (above & 0x007fffff) + of_root_half;
    const auto exponent = static_cast<float>(static_cast<int32_t>(above) >> 23);
    float m;
    std::memcpy(&m, &mantissa, sizeof(m));
    const float z = (m - 1.0f) / (m + 1.0f);
    const float s = z * z;
    float p = s * (1.0f / 9.0f) + 1.0f / 7.0f;
    p = p * s + 1.0f / 5.0f;
    p = p * s + 1.0f / 3.0f;
    return exponent * 0.69314718056f + (z + z) * (p * s + 1.0f);
}

inline double log_of_one_plus(double e) {
    return std::log1p(e);
}

#if defined(DETR_FAST_HAS_VECTORS)
template <typename Number, int Bytes>
struct VectorOf {
    typedef Number type __attribute__((vector_size(Bytes)));
};

// As many numbers as `Bytes` hold.
template <typename Number, int Bytes>
using Vector = typename VectorOf<Number, Bytes>::type;

template <typename Vector, typename Number>
DETR_FAST_INLINE Vector load(const Number* from) {
    Vector x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <typename Vector, typename Number>
DETR_FAST_INLINE void store(Number* to, Vector x) {
    std::memcpy(to, &x, sizeof(x));
}

// 0, 1, 2, ...
template <typename Vector>
DETR_FAST_INLINE Vector numbered_lanes() {
    Vector lane{};
    for (size_t l = 0; l < sizeof(Vector) / sizeof(lane[0]); ++l) lane[l] = l;
    return lane;
}

// A row that is read by whole vectors has the first of them at 0, width, ... below `whole`; the last one ends with the
// row, and of that `unseen` says which numbers are in no vector before it. For rows of at least `width` numbers.
template <int Bytes>
struct RowEnd {
    static constexpr int64_t width = Bytes / sizeof(float);

    int64_t whole, start;
    Vector<int32_t, Bytes> unseen;

    DETR_FAST_INLINE explicit RowEnd(int64_t length) : whole((length - 1) / width * width), start(length - width) {
        unseen = numbered_lanes<Vector<int32_t, Bytes>>() >= static_cast<int32_t>(whole - start);
    }
};

template <typename Floats, typename = std::enable_if_t<!std::is_arithmetic_v<Floats>>>
DETR_FAST_INLINE Floats exp_of_nonpositive(Floats x) {
    return exponential::exp_of_nonpositive<Vector<uint32_t, sizeof(Floats)>>(x);
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

// Halves a vector until four floats are left; combine(a, b) works on vectors and on numbers.
template <typename Floats, typename Combine>
DETR_FAST_INLINE float reduce(Floats x, Combine combine) {
    if constexpr (sizeof(Floats) == 16) {
        return combine(combine(x[0], x[2]), combine(x[1], x[3]));
    } else {
        Vector<float, sizeof(Floats) / 2> half[2];
        std::memcpy(half, &x, sizeof(half));
        return reduce(combine(half[0], half[1]), combine);
    }
}
#endif

}  // namespace detr_fast
