// The box losses of a matched pair, and their gradients with respect to the query's box.
//
// Gradients are PyTorch's where a function has a corner: of a minimum or maximum of two equal numbers each gets half,
// clamp(min) passes the gradient on at its bound, and the slope of |0| is 0.

#pragma once

#include "box.h"
#include "limits.h"
#include "team.h"

namespace detr_fast {

template <typename Real>
struct PairLoss {
    Real l1;
    Real giou;  // 1 - generalized IoU
    Real iou;
    Real l1_slope[4];  // cx, cy, w, h
    Real giou_slope[4];
};

namespace pair_loss {

template <typename Real>
DETR_FAST_HD Real sign(Real x) {
    return static_cast<Real>((x > Real(0)) - (x < Real(0)));
}

// The share of a gradient of the lower (or the higher) of two numbers that `chosen` gets.
template <typename Real>
DETR_FAST_HD Real share_as_lower(Real chosen, Real other) {
    return chosen < other ? Real(1) : chosen == other ? Real(0.5) : Real(0);
}

template <typename Real>
struct Side {  // of a box, along one axis
    Real low, high;
};

template <typename Real>
struct Axis {           // how two boxes lie along one axis
    Real inner, outer;  // lengths of overlap and of the hull
    Side<Real> inner_slope, outer_slope;

    static DETR_FAST_HD Axis of(const Side<Real>& a, const Side<Real>& b) {
        const Real zero = Real(0);
        const Real high_is_lower = share_as_lower(a.high, b.high);
        const Real low_is_lower = share_as_lower(a.low, b.low);
        const Real overlap = box::lower(a.high, b.high) - box::higher(a.low, b.low);
        const Real hull = box::higher(a.high, b.high) - box::lower(a.low, b.low);
        const Real overlaps = overlap >= zero ? Real(1) : zero;
        const Real spans = hull >= zero ? Real(1) : zero;
        return {box::higher(overlap, zero),
                box::higher(hull, zero),
                {-overlaps * (Real(1) - low_is_lower), overlaps * high_is_lower},
                {-spans * low_is_lower, spans * (Real(1) - high_is_lower)}};
    }
};

}  // namespace pair_loss

template <typename Real>
DETR_FAST_HD PairLoss<Real> pair_loss_of(const Box<Real>& query, const Box<Real>& target) {
    using pair_loss::Axis;
    using pair_loss::sign;
    constexpr Real tiny = Limits<Real>::tiny;
    const Real half = Real(0.5);
    const auto x = Axis<Real>::of({query.x0, query.x1}, {target.x0, target.x1});
    const auto y = Axis<Real>::of({query.y0, query.y1}, {target.y0, target.y1});
    const Real intersection = x.inner * y.inner;
    const Real united = query.area + target.area - intersection;
    const Real enclosing = x.outer * y.outer;
    const Real per_union = Real(1) / box::higher(united, tiny);
    const Real per_hull = Real(1) / box::higher(enclosing, tiny);
    const Real iou = intersection / box::higher(united, tiny);
    const Real gap = (enclosing - united) / box::higher(enclosing, tiny);

    // Of giou = intersection / union - (hull - union) / hull, with union = area + area - intersection.
    const Real by_area = (united >= tiny ? -iou * per_union : Real(0)) + per_hull;
    const Real by_inner = per_union - by_area;
    const Real by_outer = -(per_hull - (enclosing >= tiny ? gap * per_hull : Real(0)));
    const Real width = query.x1 - query.x0;
    const Real height = query.y1 - query.y0;
    const Real by_inner_x = by_inner * y.inner, by_outer_x = by_outer * y.outer, by_area_x = by_area * height;
    const Real by_inner_y = by_inner * x.inner, by_outer_y = by_outer * x.outer, by_area_y = by_area * width;
    const Real by_x0 = by_inner_x * x.inner_slope.low + by_outer_x * x.outer_slope.low - by_area_x;
    const Real by_x1 = by_inner_x * x.inner_slope.high + by_outer_x * x.outer_slope.high + by_area_x;
    const Real by_y0 = by_inner_y * y.inner_slope.low + by_outer_y * y.outer_slope.low - by_area_y;
    const Real by_y1 = by_inner_y * y.inner_slope.high + by_outer_y * y.outer_slope.high + by_area_y;
    return {
        l1_distance(query, target),
        Real(1) - (iou - gap),
        iou,
        {sign(query.cx - target.cx), sign(query.cy - target.cy), sign(query.w - target.w), sign(query.h - target.h)},
        {-(by_x0 + by_x1), -(by_y0 + by_y1), half * (by_x0 - by_x1), half * (by_y0 - by_y1)}};
}

}  // namespace detr_fast
