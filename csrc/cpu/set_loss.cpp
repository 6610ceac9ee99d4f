#include "set_loss.h"

#include "image_layers.h"
#include "layer_losses.h"
#include "softmax_rows.h"

namespace detr_fast {
namespace {

template <typename Real>
void set_loss(const detr_fast_matching_inputs& in, const int64_t* query_of_target, const void* num_boxes,
              const detr_fast_class_loss& class_loss, const detr_fast_set_losses& results, int threads) {
    LayerLosses<Real> losses(in, query_of_target, num_boxes, class_loss, results);
    for_each_image_layer_of<Real>(in, threads, [&](const auto& image, int64_t problem, int64_t first_target) {
        const auto softmax = SoftmaxRows<Real>::of_thread(image.queries, losses.exponentials(problem));
        if (losses.needs_softmax()) fill_softmax_rows(image, softmax);
        losses.add(image, problem, query_of_target + first_target, softmax);
    });
    losses.finish();
}

}  // namespace
}  // namespace detr_fast

void detr_fast_set_loss_cpu(const detr_fast_matching_inputs* inputs, const int64_t* query_of_target,
                            const void* num_boxes, const detr_fast_class_loss* class_loss,
                            const detr_fast_set_losses* results, int threads) {
    if (inputs->is_double) {
        detr_fast::set_loss<double>(*inputs, query_of_target, num_boxes, *class_loss, *results, threads);
    } else {
        detr_fast::set_loss<float>(*inputs, query_of_target, num_boxes, *class_loss, *results, threads);
    }
}
