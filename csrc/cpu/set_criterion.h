// Matching and losses in one pass on the CPU. See detr_fast/ops/set_criterion/api.py for what it computes.

#pragma once

#include <cstdint>

#include "matching.h"
#include "set_loss.h"

#if defined(__cplusplus)
extern "C" {
#endif

// detr_fast_matching_cpu, then detr_fast_set_loss_cpu of what it found, with the softmax of logits computed once for
// both: the results are theirs to rounding.
void detr_fast_set_criterion_cpu(const struct detr_fast_matching_inputs* inputs,
                                 const struct detr_fast_cost_weights* weights, const void* num_boxes,
                                 const struct detr_fast_class_loss* class_loss, int64_t* query_of_target,
                                 int64_t* nonfinite, const struct detr_fast_set_losses* results, int threads);

#if defined(__cplusplus)
}
#endif
