// Class losses of a query: a row of logits to the loss and its gradient. Rows of floats go a vector at a time.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "set_loss.h"
#include "vectors.h"

namespace detr_fast {

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
struct SigmoidRow {
    Real highest;
    double loss;
};

template <int, typename Real>
DETR_FAST_INLINE void scale_row(Real* row, int64_t classes, Real factor) {
    for (int64_t c = 0; c < classes; ++c) row[c] *= factor;
}

// The loss of all classes but `label` (-1: of all), none of which is there.
template <int, typename Real>
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

#if defined(DETR_FAST_HAS_VECTORS)
template <int Bytes>
DETR_FAST_INLINE void scale_row(float* row, int64_t classes, float factor) {
    using Floats = Vector<float, Bytes>;
    constexpr int64_t width = RowEnd<Bytes>::width;
    if (classes < width) return scale_row<Bytes, float>(row, classes, factor);
    const RowEnd<Bytes> end(classes);
    const Floats last = load<Floats>(row + end.start) * factor;
    for (int64_t c = 0; c < end.whole; c += width) store(row + c, load<Floats>(row + c) * factor);
    store(row + end.start, last);
}

template <int Bytes>
DETR_FAST_INLINE SigmoidRow<float> sigmoid_row(const float* logits, int64_t classes, int64_t label,
                                               const SigmoidLoss<float>& sigmoid, float factor, float* slope) {
    using Floats = Vector<float, Bytes>;
    using Lanes = Vector<int32_t, Bytes>;
    constexpr int64_t width = RowEnd<Bytes>::width;
    if (classes < width) return sigmoid_row<Bytes, float>(logits, classes, label, sigmoid, factor, slope);
    constexpr Higher higher;
    constexpr Add add;
    constexpr float no_loss = exponential::lowest;  // the logit of a probability of 0
    const RowEnd<Bytes> end(classes);
    const auto from_zero = numbered_lanes<Lanes>();
    const Floats last = load<Floats>(logits + end.start);
    const Lanes counted = end.unseen & (from_zero + static_cast<int32_t>(end.start) != static_cast<int32_t>(label));
    auto found = sigmoid.absent(counted ? last : Floats{} + no_loss);
    Floats high = last;
    Floats sums = found.loss;
    // Lanes that were seen before are overwritten below.
    if (slope != nullptr) store(slope + end.start, factor * found.slope);
    for (int64_t c = 0; c < end.whole; c += width) {
        const Floats x = load<Floats>(logits + c);
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
