// Pairs of boxes: generalized IoU and L1 distance.

#pragma once

#include "limits.h"
#include "team.h"

namespace detr_fast {

template <typename Real>
struct Box {  // centre and size, as fractions of the image, and what follows from them
    Real cx, cy, w, h;
    Real x0, y0, x1, y1;
    Real area;

    static DETR_FAST_HD Box of(Real cx, Real cy, Real w, Real h) {
        const Real half = Real(0.5);
        Box box{cx, cy, w, h, cx - half * w, cy - half * h, cx + half * w, cy + half * h, Real(0)};
        box.area = (box.x1 - box.x0) * (box.y1 - box.y0);
        return box;
    }
};

namespace box {

template <typename Real>
DETR_FAST_HD Real lower(Real a, Real b) {
    return a < b ? a : b;
}

template <typename Real>
DETR_FAST_HD Real higher(Real a, Real b) {
    return a > b ? a : b;
}

template <typename Real>
DETR_FAST_HD Real magnitude(Real a) {
    return a < Real(0) ? -a : a;
}

}  // namespace box

// Sum of absolute differences of centre and size.
template <typename Real>
DETR_FAST_HD Real l1_distance(const Box<Real>& a, const Box<Real>& b) {
    using box::magnitude;
    return magnitude(a.cx - b.cx) + magnitude(a.cy - b.cy) + magnitude(a.w - b.w) + magnitude(a.h - b.h);
}

// Rezatofighi et al. 2019, equation 1. A zero area divides as the smallest positive number: 0 / 0 is 0.
template <typename Real>
DETR_FAST_HD Real giou(const Box<Real>& a, const Box<Real>& b) {
    using box::higher;
    using box::lower;
    constexpr Real tiny = Limits<Real>::tiny;
    const Real zero = Real(0);
    const Real inner_w = higher(lower(a.x1, b.x1) - higher(a.x0, b.x0), zero);
    const Real inner_h = higher(lower(a.y1, b.y1) - higher(a.y0, b.y0), zero);
    const Real intersection = inner_w * inner_h;
    const Real united = a.area + b.area - intersection;
    const Real outer_w = higher(higher(a.x1, b.x1) - lower(a.x0, b.x0), zero);
    const Real outer_h = higher(higher(a.y1, b.y1) - lower(a.y0, b.y0), zero);
    const Real enclosing = outer_w * outer_h;
    return intersection / higher(united, tiny) - (enclosing - united) / higher(enclosing, tiny);
}

}  // namespace detr_fast
