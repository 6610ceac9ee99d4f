// Cost and assignment in one launch on a CUDA device. See detr_fast/ops/matching/api.py for what it computes.

#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "../core/matching_inputs.h"

#if defined(__cplusplus)
extern "C" {
#endif

// How numbers lie in memory.
struct detr_fast_matching_dtypes {
    int32_t logits;  // float64 exactly where the inputs' is_double
    int32_t boxes;
    int32_t target_boxes;
    int32_t extra;
};

// The bytes of device memory that the launch needs as workspace; 0 where every problem fits in shared memory.
// A CUDA error is returned negated.
int64_t detr_fast_matching_cuda_workspace(const struct detr_fast_matching_inputs* inputs, int device);

// Where the targets of padded memory lie. Launches depend on the inputs' num_targets alone, of which each is then the
// most targets that the image may have; so a captured graph takes other counts when `offsets` holds others.
struct detr_fast_padded_targets {
    const int64_t* offsets;  // [B + 1] in device memory: image b has those from offsets[b] to offsets[b + 1]; or null
    int64_t room;            // targets that there is memory for
};

// As detr_fast_matching_cpu, except that what the inputs' addresses lead to, the results and the workspace are device
// memory, and that a label out of range makes costs that are no numbers. The struct, the addresses of the layers and
// num_targets are host memory, read before the call returns. Neither allocates nor waits; works in stream order, and
// can be captured in a graph (the counts are then part of it, unless `padded` has offsets; of the room behind the last
// target nothing is written). One launch for up to 16 layers and 768 images, more for
// more. Returns a cudaError_t.
int detr_fast_matching_cuda(const struct detr_fast_matching_inputs* inputs,
                            const struct detr_fast_matching_dtypes* dtypes,
                            const struct detr_fast_cost_weights* weights, const struct detr_fast_padded_targets* padded,
                            int64_t* query_of_target, int64_t* nonfinite, void* workspace, int device, void* stream);

#if defined(__cplusplus)
}
#endif
