// The set criterion's losses and their gradients on the CPU. See detr_fast/ops/set_loss/api.py for what it computes.

#pragma once

#include <cstdint>

#include "../core/matching_inputs.h"

#if defined(__cplusplus)
extern "C" {
#endif

enum detr_fast_class_loss_kind { detr_fast_cross_entropy = 0, detr_fast_focal = 1, detr_fast_varifocal = 2 };

struct detr_fast_class_loss {
    enum detr_fast_class_loss_kind kind;
    const void* weight;  // [classes], of the cross-entropy
    double alpha;        // of the other two
    double gamma;
};

// Addresses of contiguous arrays, of the same type as the predictions.
struct detr_fast_set_losses {
    void* losses;       // [3, L]: class, L1, GIoU
    void* metrics;      // [2, L]: class error, cardinality error
    void* logit_slope;  // [L, B, Q, classes]: gradient of a layer's class loss; or null, and then
    void* l1_slope;     // [L, B, Q, 4]: neither of these is written
    void* giou_slope;
};

// query_of_target [L, N]: -1 for none; no query twice in an image. num_boxes: one number. Labels must be in range.
// Throws std::bad_alloc.
void detr_fast_set_loss_cpu(const struct detr_fast_matching_inputs* inputs, const int64_t* query_of_target,
                            const void* num_boxes, const struct detr_fast_class_loss* class_loss,
                            const struct detr_fast_set_losses* results, int threads);

// Multiplies the gradients that detr_fast_set_loss_cpu wrote by those of the losses, upstream [3, L]: logit_gradient
// [L, elements of a layer's logits] and box_gradient [L, elements of a layer's boxes]. These may be saved->logit_slope
// and saved->l1_slope themselves.
void detr_fast_set_loss_backward_cpu(int is_double, const int64_t* elements, int64_t layers, const void* upstream,
                                     const struct detr_fast_set_losses* saved, void* logit_gradient, void* box_gradient,
                                     int threads);

#if defined(__cplusplus)
}
#endif
