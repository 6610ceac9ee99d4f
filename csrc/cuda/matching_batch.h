// What csrc/cuda/matching.cu passes to its kernel.

#pragma once

#include <cstddef>
#include <cstdint>

#include "matching.h"

namespace detr_fast {
namespace {

// Counts and the layers' addresses travel as kernel arguments (4 KiB at most in all): no copy to wait for, and a graph
// captures them.
constexpr int layers_per_launch = 16;
constexpr int images_per_launch = 768;
struct Layers {
    const void* logits[layers_per_launch];
    const void* boxes[layers_per_launch];
    const void* extra[layers_per_launch];
};

struct Images {  // of a launch; targets are counted from the first one of the launch
    int32_t first_target[images_per_launch + 1];
};

// Where a block keeps its problem. Shared memory if it fits, since the search waits for every read of it.
struct Placement {
    bool state_is_shared;
    bool tile_is_shared;
    size_t state_bytes;  // of the largest problem
    size_t shared_bytes;
    size_t shared_limit;     // of the device
    size_t workspace_bytes;  // of one problem
};

struct Batch {
    int64_t queries;
    int64_t classes;
    int64_t logit_strides[2];
    int64_t box_strides[2];
    const int64_t* labels;
    const void* target_boxes;
    bool has_extra;
    detr_fast_matching_dtypes dtypes;
    detr_fast_cost_weights weights;
    int64_t all_images;
    int64_t all_targets;     // or the room for them
    const int64_t* offsets;  // [B + 1] of targets that are padded, or null
    int64_t most_targets;    // of an image
    int64_t* query_of_target;
    int64_t* nonfinite;
    unsigned char* workspace;
    Placement placement;
    // What this launch covers.
    int64_t first_layer;
    int64_t first_image;
    int64_t first_target;
    unsigned images;
};

static_assert(sizeof(Batch) + sizeof(Layers) + sizeof(Images) <= 4096, "more than kernel arguments may take");

struct Span {
    int64_t first;
    int32_t count;
};

__device__ int64_t lesser(int64_t a, int64_t b) {
    return a < b ? a : b;
}
__device__ int64_t greater(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// Nobody on the host has looked at the offsets: nothing outside the room for targets is read or written.
__device__ Span targets_of(const Batch& batch, const Images& images, unsigned image) {
    if (batch.offsets == nullptr) {
        const int32_t* first = images.first_target + image;
        return {batch.first_target + first[0], first[1] - first[0]};
    }
    const int64_t* offsets = batch.offsets + batch.first_image + image;
    const int64_t first = greater(offsets[0], 0);
    const int64_t end = lesser(offsets[1], batch.all_targets);
    return {first, static_cast<int32_t>(greater(lesser(end - first, batch.most_targets), 0))};
}

}  // namespace
}  // namespace detr_fast
