// What a query costs a target, and what stands for a cost that is no number.

#pragma once

#include <cmath>
#include <cstdint>

#include "box.h"
#include "matching_inputs.h"
#include "team.h"

namespace detr_fast {

// Costs of this magnitude and beyond, and those that are no numbers, are treated alike.
constexpr double largest_cost = 1e30;

template <typename Real>
struct PairWeights {
    Real cost_class, cost_bbox, cost_giou;

    static DETR_FAST_HD PairWeights of(const detr_fast_cost_weights& weights) {
        return {static_cast<Real>(weights.cost_class), static_cast<Real>(weights.cost_bbox),
                static_cast<Real>(weights.cost_giou)};
    }
};

// Carion et al. 2020, section 3.1, equation 2.
template <typename Real>
DETR_FAST_HD Real pair_cost(const PairWeights<Real>& weights, const Box<Real>& query, const Box<Real>& target,
                            Real class_cost) {
    return weights.cost_bbox * l1_distance(query, target) + weights.cost_class * class_cost -
           weights.cost_giou * giou(query, target);
}

// Deformable DETR's: focal loss of the class being there, less that of it not being there.
template <typename Real>
DETR_FAST_HD Real focal_class_cost(Real logit, Real alpha, Real gamma) {
    constexpr Real epsilon = static_cast<Real>(1e-8);
    const Real p = Real(1) / (Real(1) + std::exp(-logit));
    const Real there = alpha * std::pow(Real(1) - p, gamma) * -std::log(p + epsilon);
    const Real absent = (Real(1) - alpha) * std::pow(p, gamma) * -std::log(Real(1) - p + epsilon);
    return there - absent;
}

template <typename Real>
DETR_FAST_HD bool is_usable(Real cost) {
    return box::magnitude(cost) < static_cast<Real>(largest_cost);
}

// Stands for every unusable cost of a problem whose usable ones are in [lowest, highest], which holds 0. More than all
// pairs of any matching can differ by: one such pair less is always worth it.
DETR_FAST_HD double penalty(double lowest, double highest, int64_t queries, int64_t targets) {
    return highest + (highest - lowest + 1) * static_cast<double>((queries < targets ? queries : targets) + 1);
}

}  // namespace detr_fast
