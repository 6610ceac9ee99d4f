// What the launchers of matching_cost and matching take besides results. See detr_fast/ops/matching_cost/api.py.

#pragma once

#include <cstdint>

struct detr_fast_cost_weights {
    double cost_class;
    double cost_bbox;
    double cost_giou;
    bool focal;  // else the probability of a softmax over the classes
    double alpha;
    double gamma;
};

// Predictions of L layers and targets of B images, computed in float64 where is_double, else in float32. The CPU takes
// all numbers in that type.
struct detr_fast_matching_inputs {
    bool is_double;
    int64_t layers;
    int64_t images;
    int64_t queries;
    int64_t classes;            // length of a query's logits
    const void* const* logits;  // L addresses of [B, Q, classes], classes contiguous
    const void* const* boxes;   // L addresses of [B, Q, 4], coordinates contiguous
    const void* const* extra;   // L addresses of [N, Q], contiguous, or null
    int64_t logit_strides[2];   // from image to image, from query to query, in elements
    int64_t box_strides[2];
    const int64_t* labels;       // [N]
    const void* target_boxes;    // [N, 4], contiguous
    const int64_t* num_targets;  // [B], their sum is N
};
