// The losses of one image at one decoder layer, whose targets have their queries.

#pragma once

#include <cstdint>

#include "image_layers.h"
#include "set_loss.h"
#include "softmax_rows.h"

namespace detr_fast {

struct LossSums {  // over the queries of an image at a layer
    double class_loss, l1, giou;
    int64_t matched, correct, objects;
};

// What an image's losses at a layer need beside its predictions and targets.
template <typename Real>
struct Matched {
    const int64_t* query_of_target;
    const detr_fast_class_loss* class_loss;
    Real per_class_loss;  // 1 / what the class loss is divided by
    Real per_box;         // 1 / num_boxes
    Real* logit_slope;    // null where no gradients are asked for
    Real* l1_slope;
    Real* giou_slope;
};

// Of the cross-entropy's logits, softmax must be known, with its exponentials in logit_slope where that is asked for.
LossSums image_losses(const ImageLayer<float>& image, const Matched<float>& matched, const SoftmaxRows<float>& softmax);
LossSums image_losses(const ImageLayer<double>& image, const Matched<double>& matched,
                      const SoftmaxRows<double>& softmax);

}  // namespace detr_fast
