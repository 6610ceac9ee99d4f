// Visits every image of every decoder layer, spread over threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/matching_inputs.h"
#include "thread_pool.h"

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

// Logits and costs that take 15 microseconds. A thread that torch has left awake joins in two, one asleep in 20 to 40.
constexpr int64_t work_worth_a_thread = 1 << 16;

template <typename Real, typename Visit>
void for_each_image_layer_of(const detr_fast_matching_inputs& in, int threads, const Visit& visit) {
    std::vector<int64_t> first_target(in.images + 1, 0);
    int64_t work = 0;
    for (int64_t b = 0; b < in.images; ++b) {
        first_target[b + 1] = first_target[b] + in.num_targets[b];
        if (in.num_targets[b] > 0) work += in.layers * in.queries * (in.classes + 8 * in.num_targets[b]);
    }
    const int64_t all_targets = first_target[in.images];
    const int64_t useful = std::max<int64_t>(1, work / work_worth_a_thread);
    parallel_for(in.layers * in.images, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t problem) {
        const int64_t l = problem / in.images;
        const int64_t b = problem % in.images;
        const int64_t first = first_target[b];
        ImageLayer<Real> image{};
        image.logits = static_cast<const Real*>(in.logits[l]) + b * in.logit_strides[0];
        image.boxes = static_cast<const Real*>(in.boxes[l]) + b * in.box_strides[0];
        image.logit_stride = in.logit_strides[1];
        image.box_stride = in.box_strides[1];
        image.labels = in.labels + first;
        image.target_boxes = static_cast<const Real*>(in.target_boxes) + 4 * first;
        image.extra = in.extra == nullptr ? nullptr : static_cast<const Real*>(in.extra[l]) + first * in.queries;
        image.queries = in.queries;
        image.classes = in.classes;
        image.targets = in.num_targets[b];
        visit(image, problem, l * all_targets + first);
    });
}

// Calls visit(image, problem, row): problem = layer * B + image; row = layer * N + the image's first target.
template <typename Visit>
void for_each_image_layer(const detr_fast_matching_inputs& in, int threads, const Visit& visit) {
    if (in.is_double) {
        for_each_image_layer_of<double>(in, threads, visit);
    } else {
        for_each_image_layer_of<float>(in, threads, visit);
    }
}

}  // namespace detr_fast
