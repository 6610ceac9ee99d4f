// The matching cost of one image at one decoder layer: its targets' rows of costs against its own queries.

#pragma once

#include <cstddef>
#include <cstdint>

#include "matching_cost.h"

namespace detr_fast {

template <typename Real>
struct ImageLayer {
    const Real* logits;    // [Q, classes], classes contiguous
    const Real* boxes;     // [Q, 4] cxcywh, coordinates contiguous
    int64_t logit_stride;  // from query to query
    int64_t box_stride;
    const int64_t* labels;     // [T]
    const Real* target_boxes;  // [T, 4] cxcywh
    const Real* extra;         // [T, Q] costs to add, or null
    int64_t queries;
    int64_t classes;
    int64_t targets;
};

// Elements of scratch that fill_cost_tile needs.
int64_t cost_tile_scratch(int64_t queries, int64_t targets);

// Writes tile [T, Q]; labels must be in range. Returns how many costs were not numbers below 1e30 in magnitude: each
// stands as one and the same cost, so high that the solver takes such a pair only where it can take no other.
int64_t fill_cost_tile(const ImageLayer<float>& image, const detr_fast_cost_weights& weights, float* tile,
                       float* scratch);
int64_t fill_cost_tile(const ImageLayer<double>& image, const detr_fast_cost_weights& weights, double* tile,
                       double* scratch);

}  // namespace detr_fast
