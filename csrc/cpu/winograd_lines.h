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

template <typename Number>
DETR_FAST_INLINE void input_line(const Number (&x)[inputs], Number (&at)[inputs]) {
    const Number even_p = x[4] - q2 * x[2], odd_p = x[3] - q2 * x[1];
    const Number even_q = x[4] - p2 * x[2], odd_q = x[3] - p2 * x[1];
    at[0] = p2 * q2 * x[0] - (p2 + q2) * x[2] + x[4];
    at[1] = even_p + p * odd_p;
    at[2] = even_p - p * odd_p;
    at[3] = even_q + q * odd_q;
    at[4] = even_q - q * odd_q;
    at[5] = p2 * q2 * x[1] - (p2 + q2) * x[3] + x[5];
}

template <typename Number>
DETR_FAST_INLINE void output_line(const Number (&at)[inputs], Number (&y)[outputs]) {
    const Number even_p = at[1] + at[2], odd_p = at[1] - at[2];
    const Number even_q = at[3] + at[4], odd_q = at[3] - at[4];
    y[0] = at[0] + even_p + even_q;
    y[1] = p * odd_p + q * odd_q;
    y[2] = p2 * even_p + q2 * even_q;
    y[3] = p * p2 * odd_p + q * q2 * odd_q + at[5];
}

// The values of w[0] + w[1] x + w[2] x^2 at the points, each over the derivative there of the polynomial that is zero
// at all of them.
template <typename Doubles>
DETR_FAST_INLINE void weight_line(const Doubles (&w)[3], Doubles (&at)[inputs]) {
    constexpr double p1 = p, q1 = q, pp = p2, qq = q2;
    constexpr double of_0 = 1 / (pp * qq), of_p = 1 / (2 * pp * (pp - qq)), of_q = 1 / (2 * qq * (qq - pp));
    const Doubles even_p = of_p * (w[0] + pp * w[2]), odd_p = of_p * p1 * w[1];
    const Doubles even_q = of_q * (w[0] + qq * w[2]), odd_q = of_q * q1 * w[1];
    at[0] = of_0 * w[0];
    at[1] = even_p + odd_p;
    at[2] = even_p - odd_p;
    at[3] = even_q + odd_q;
    at[4] = even_q - odd_q;
    at[5] = w[2];
}

}  // namespace winograd
}  // namespace detr_fast
