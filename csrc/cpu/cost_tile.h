// The matching cost of one image at one decoder layer: its targets' rows of costs against its own queries.

#pragma once

#include <cstddef>
#include <cstdint>

#include "image_layers.h"
#include "matching_cost.h"
#include "softmax_rows.h"

namespace detr_fast {

// Elements of scratch that fill_cost_tile needs.
int64_t cost_tile_scratch(int64_t queries, int64_t targets);

// Writes tile [T, Q]; labels must be in range, and softmax be that of the logits unless the weights are focal. Returns
// how many costs were not numbers below 1e30 in magnitude: each stands as one and the same cost, so high that the
// solver takes such a pair only where it can take no other.
int64_t fill_cost_tile(const ImageLayer<float>& image, const detr_fast_cost_weights& weights,
                       const SoftmaxRows<float>& softmax, float* tile, float* scratch);
int64_t fill_cost_tile(const ImageLayer<double>& image, const detr_fast_cost_weights& weights,
                       const SoftmaxRows<double>& softmax, double* tile, double* scratch);

}  // namespace detr_fast
