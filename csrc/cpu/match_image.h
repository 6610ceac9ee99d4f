// The matching of one image at one decoder layer.

#pragma once

#include <cstdint>

#include "image_layers.h"
#include "matching_cost.h"
#include "softmax_rows.h"

namespace detr_fast {

// Writes query_of_target [T], -1 where there is none. Returns fill_cost_tile's count, and asks the same of softmax.
int64_t match_image(const ImageLayer<float>& image, const detr_fast_cost_weights& weights,
                    const SoftmaxRows<float>& softmax, int64_t* query_of_target);
int64_t match_image(const ImageLayer<double>& image, const detr_fast_cost_weights& weights,
                    const SoftmaxRows<double>& softmax, int64_t* query_of_target);

}  // namespace detr_fast
