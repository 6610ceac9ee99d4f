// Class losses of a query: a row of logits to the loss and its gradient. Rows of floats go sixteen at a time.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "floats.h"
#include "set_loss.h"

namespace detr_fast {

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

inline double log_of_one_plus(double e) {
    return std::log1p(e);
}

template <typename Number>
struct Sigmoid {     // of a logit
    Number p, rest;  // p + rest = 1, without cancellation
    Number minus_log_p, minus_log_rest;

    static DETR_FAST_INLINE Sigmoid of(Number x) {
        const Number zero{};
        const Number e = exp_of_nonpositive(x < zero ? x : -x);
        const Number larger = 1.0f / (1.0f + e);
        const Number smaller = e * larger;
        const Number log_term = log_of_one_plus(e);
        return {x < zero ? smaller : larger, x < zero ? larger : smaller, (x < zero ? -x : zero) + log_term,
                (x < zero ? zero : x) + log_term};
    }
};

template <typename Number>
struct LossAndSlope {
    Number loss, slope;
};

template <typename Real>
struct SigmoidLoss {  // focal or varifocal, of one logit
    bool varifocal;
    Real alpha, gamma;

    // p^gamma.
    template <typename Number>
    DETR_FAST_INLINE Number power(Number p, Number minus_log_p) const {
        if (gamma == Real(2)) return p * p;
        return exp_of_nonpositive(-gamma * minus_log_p);
    }

    // Of a class that is not there.
    template <typename Number>
    DETR_FAST_INLINE LossAndSlope<Number> absent(Number logit) const {
        const auto s = Sigmoid<Number>::of(logit);
        const Number modulation = power(s.p, s.minus_log_p);
        if (varifocal) return {alpha * modulation * s.minus_log_rest, alpha * modulation * s.p};
        const Number weighted = (Real(1) - alpha) * modulation;
        return {weighted * s.minus_log_rest, weighted * (gamma * s.rest * s.minus_log_rest + s.p)};
    }

    // Of the class that is; `score` is the IoU of the boxes, which the varifocal loss wants the probability to be.
    DETR_FAST_INLINE LossAndSlope<Real> present(Real logit, Real score) const {
        const auto s = Sigmoid<Real>::of(logit);
        if (varifocal) return {score * (s.minus_log_rest - score * logit), score * (s.p - score)};
        const Real weighted = alpha * power(s.rest, s.minus_log_rest);
        return {weighted * s.minus_log_p, -weighted * (gamma * s.p * s.minus_log_p + s.rest)};
    }
};

template <typename Real>
struct SoftmaxRow {
    Real highest;
    Real sum;  // of e^(logit - highest)
};

template <typename Real>
struct SigmoidRow {
    Real highest;
    double loss;
};

// The softmax's sum, and factor times its probabilities in slope, unless that is null.
template <typename Real>
DETR_FAST_INLINE SoftmaxRow<Real> softmax_row(const Real* logits, int64_t classes, Real factor, Real* slope) {
    Real highest = logits[0];
    for (int64_t c = 1; c < classes; ++c) highest = logits[c] > highest ? logits[c] : highest;
    Real sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
        const Real e = exp_of_nonpositive(logits[c] - highest);
        sum += e;
        if (slope != nullptr) slope[c] = e;
    }
    if (slope != nullptr) {
        for (int64_t c = 0; c < classes; ++c) slope[c] *= factor / sum;
    }
    return {highest, sum};
}

// The loss of all classes but `label` (-1: of all), none of which is there.
template <typename Real>
DETR_FAST_INLINE SigmoidRow<Real> sigmoid_row(const Real* logits, int64_t classes, int64_t label,
                                              const SigmoidLoss<Real>& sigmoid, Real factor, Real* slope) {
    SigmoidRow<Real> row{logits[0], 0.0};
    for (int64_t c = 0; c < classes; ++c) {
        row.highest = logits[c] > row.highest ? logits[c] : row.highest;
        const auto found = sigmoid.absent(logits[c]);
        if (c != label) row.loss += static_cast<double>(found.loss);
        if (slope != nullptr) slope[c] = factor * found.slope;
    }
    return row;
}

#if defined(DETR_FAST_HAS_FLOATS)
typedef int32_t Lanes __attribute__((vector_size(64)));

DETR_FAST_INLINE void store(float* to, const Floats& x) {
    std::memcpy(to, &x, sizeof(x));
}

// What is left of a row after its whole sixteens are its last sixteen, of which the first have been seen.
struct LastFloats {
    int64_t whole, start;
    Lanes unseen;

    explicit LastFloats(int64_t classes) : whole(classes / num_floats * num_floats), start(classes - num_floats) {
        const auto first = static_cast<int32_t>(whole - start);
        for (int32_t l = 0; l < num_floats; ++l) unseen[l] = l >= first ? -1 : 0;
    }
};

DETR_FAST_INLINE SoftmaxRow<float> softmax_row(const float* logits, int64_t classes, float factor, float* slope) {
    if (classes < num_floats) return softmax_row<float>(logits, classes, factor, slope);
    constexpr Higher higher;
    constexpr Add add;
    const LastFloats end(classes);
    const Floats last = load(logits + end.start);
    Floats high = last;
    for (int64_t c = 0; c < end.whole; c += num_floats) high = higher(load(logits + c), high);
    const float highest = reduce(high, higher);
    const Floats last_e = exp_of_nonpositive(last - highest);
    Floats sums = end.unseen ? last_e : Floats{};
    for (int64_t c = 0; c < end.whole; c += num_floats) {
        const Floats e = exp_of_nonpositive(load(logits + c) - highest);
        sums += e;
        if (slope != nullptr) store(slope + c, e);
    }
    const float sum = reduce(sums, add);
    if (slope != nullptr) {
        const float scale = factor / sum;
        for (int64_t c = 0; c < end.whole; c += num_floats) store(slope + c, load(slope + c) * scale);
        store(slope + end.start, last_e * scale);
    }
    return {highest, sum};
}

DETR_FAST_INLINE SigmoidRow<float> sigmoid_row(const float* logits, int64_t classes, int64_t label,
                                               const SigmoidLoss<float>& sigmoid, float factor, float* slope) {
    if (classes < num_floats) return sigmoid_row<float>(logits, classes, label, sigmoid, factor, slope);
    constexpr Higher higher;
    constexpr Add add;
    constexpr float no_loss = exponential::lowest;  // the logit of a probability of 0
    const LastFloats end(classes);
    const Lanes from_zero = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Floats last = load(logits + end.start);
    const Lanes counted = end.unseen & (from_zero + static_cast<int32_t>(end.start) != static_cast<int32_t>(label));
    auto found = sigmoid.absent(counted ? last : Floats{} + no_loss);
    Floats high = last;
    Floats sums = found.loss;
    // Lanes that were seen before are overwritten below.
    if (slope != nullptr) store(slope + end.start, factor * found.slope);
    for (int64_t c = 0; c < end.whole; c += num_floats) {
        const Floats x = load(logits + c);
        high = higher(x, high);
        const Lanes is_label = from_zero + static_cast<int32_t>(c) == static_cast<int32_t>(label);
        found = sigmoid.absent(is_label ? Floats{} + no_loss : x);
        sums += found.loss;
        if (slope != nullptr) store(slope + c, factor * found.slope);
    }
    return {reduce(high, higher), static_cast<double>(reduce(sums, add))};
}
#endif

}  // namespace detr_fast
