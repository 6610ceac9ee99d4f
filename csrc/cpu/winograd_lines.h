// The transforms of Winograd's F(4, 3) along one line; a map's patches are transformed along rows and columns.
//
// With polynomials: 4 outputs of a filter of 3 over 6 inputs is the transpose of a product of polynomials of degrees 3
// and 2, which its values at 6 points give: here 0, +-5/8, +-3/2 and infinity. A pair of points shares its even and odd
// parts. Every constant is exact in float32.
//
// The points decide how rounding errors grow. Relative to the outputs' root mean square, for rectified normal numbers:
// the error's root mean square is 6.6e-7 for 64 channels and 1.6e-6 for 512, its largest 8.6e-6 and 1.7e-5. Sums as
// they are defined have half of that in float32: 3.0e-7 and 8.5e-7, 2.9e-6 and 9.3e-6. The usual points 1 and 2
// have 2.2 times our error, 1/2 and 2 have 1.4 times, 3/4 and 3/2 as much, and F(6, 3) 4 times.

#pragma once

#include "registers.h"

namespace detr_fast {
namespace winograd {

constexpr int outputs = 4;
constexpr int inputs = 6;
constexpr int positions = inputs * inputs;

constexpr float p = 0.625f, q = 1.5f;
constexpr float p2 = p * p, q2 = q * q;

// Of a sum of two products the compiler rounds one before it adds the other, here this one and there that one.
template <typename Number>
DETR_FAST_INLINE Number rounded(Number product) {
#if defined(DETR_FAST_HAS_VECTORS) && defined(__x86_64__)
    __asm__("" : "+v"(product));
#endif
    return product;
}

template <typename Number>
DETR_FAST_INLINE void input_line(const Number (&x)[inputs], Number (&at)[inputs]) {
    const Number even_p = x[4] - q2 * x[2], odd_p = x[3] - q2 * x[1];
    const Number even_q = x[4] - p2 * x[2], odd_q = x[3] - p2 * x[1];
    at[0] = p2 * q2 * x[0] + (x[4] - (p2 + q2) * x[2]);
    at[1] = even_p + p * odd_p;
    at[2] = even_p - p * odd_p;
    at[3] = even_q + q * odd_q;
    at[4] = even_q - q * odd_q;
    at[5] = p2 * q2 * x[1] + (x[5] - (p2 + q2) * x[3]);
}

template <typename Number>
DETR_FAST_INLINE void output_line(const Number (&at)[inputs], Number (&y)[outputs]) {
    const Number even_p = at[1] + at[2], odd_p = at[1] - at[2];
    const Number even_q = at[3] + at[4], odd_q = at[3] - at[4];
    y[0] = at[0] + even_p + even_q;
    y[1] = rounded(p * odd_p) + q * odd_q;
    y[2] = rounded(p2 * even_p) + q2 * even_q;
    y[3] = p * p2 * odd_p + (q * q2 * odd_q + at[5]);
}

// The value of w(0) + w(1) x + w(2) x^2 at a point, which `weight_scale` of the point is a factor of: one over the
// derivative there of the polynomial that is zero at all of them.
template <int point, typename Weight>
DETR_FAST_INLINE auto weight_at(const Weight& w) {
    if constexpr (point == 0) return w(0);
    if constexpr (point == 1) return w(0) + p2 * w(2) + p * w(1);
    if constexpr (point == 2) return w(0) + p2 * w(2) - p * w(1);
    if constexpr (point == 3) return w(0) + q2 * w(2) + q * w(1);
    if constexpr (point == 4) return w(0) + q2 * w(2) - q * w(1);
    if constexpr (point == 5) return w(2);
}

constexpr double slope_p = 2.0 * p2 * (p2 - q2), slope_q = 2.0 * q2 * (q2 - p2);
constexpr double weight_scale[inputs] = {1 / (1.0 * p2 * q2), 1 / slope_p, 1 / slope_p, 1 / slope_q, 1 / slope_q, 1};

// The transpose of output_line: what the gradient of 4 outputs is at the points.
template <typename Number>
DETR_FAST_INLINE void gradient_line(const Number (&y)[outputs], Number (&at)[inputs]) {
    const Number even_p = y[0] + p2 * y[2], odd_p = p * y[1] + p * p2 * y[3];
    const Number even_q = y[0] + q2 * y[2], odd_q = q * y[1] + q * q2 * y[3];
    at[0] = y[0];
    at[1] = even_p + odd_p;
    at[2] = even_p - odd_p;
    at[3] = even_q + odd_q;
    at[4] = even_q - odd_q;
    at[5] = y[3];
}

// The transpose of weight_at times weight_scale, for all points.
template <typename Doubles>
DETR_FAST_INLINE void weight_gradient_line(const Doubles (&at)[inputs], Doubles (&w)[3]) {
    constexpr double of_p = weight_scale[1], of_q = weight_scale[3];
    const Doubles even_p = of_p * (at[1] + at[2]), even_q = of_q * (at[3] + at[4]);
    w[0] = weight_scale[0] * at[0] + even_p + even_q;
    w[1] = of_p * p * (at[1] - at[2]) + of_q * q * (at[3] - at[4]);
    w[2] = double{p2} * even_p + double{q2} * even_q + at[5];
}

}  // namespace winograd
}  // namespace detr_fast
