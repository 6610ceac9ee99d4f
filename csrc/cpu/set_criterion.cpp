#include "set_criterion.h"

#include <algorithm>

#include "image_layers.h"
#include "layer_losses.h"
#include "match_image.h"
#include "softmax_rows.h"

namespace detr_fast {
namespace {

template <typename Real>
void set_criterion(const detr_fast_matching_inputs& in, const detr_fast_cost_weights& weights, const void* num_boxes,
                   const detr_fast_class_loss& class_loss, int64_t* query_of_target, int64_t* nonfinite,
                   const detr_fast_set_losses& results, int threads) {
    LayerLosses<Real> losses(in, nullptr, num_boxes, class_loss, results);
    for_each_image_layer_of<Real>(in, threads, [&](const auto& image, int64_t problem, int64_t first_target) {
        const auto softmax = SoftmaxRows<Real>::of_thread(image.queries, losses.exponentials(problem));
        const bool costs_need_softmax = !weights.focal && image.targets > 0;
        if (costs_need_softmax || losses.needs_softmax()) fill_softmax_rows(image, softmax);
        nonfinite[problem] = match_image(image, weights, softmax, query_of_target + first_target);
        losses.add(image, problem, query_of_target + first_target, softmax);
    });
    losses.finish();
}

}  // namespace
}  // namespace detr_fast

void detr_fast_set_criterion_cpu(const detr_fast_matching_inputs* inputs, const detr_fast_cost_weights* weights,
                                 const void* num_boxes, const detr_fast_class_loss* class_loss,
                                 int64_t* query_of_target, int64_t* nonfinite, const detr_fast_set_losses* results,
                                 int threads) {
    const int64_t* counts = inputs->num_targets;
    const bool some_without_query =
        std::any_of(counts, counts + inputs->images, [&](int64_t targets) { return targets > inputs->queries; });
    if (some_without_query) {  // by what losses are divided is then known only when all is matched
        detr_fast_matching_cpu(inputs, weights, query_of_target, nonfinite, threads);
        detr_fast_set_loss_cpu(inputs, query_of_target, num_boxes, class_loss, results, threads);
    } else if (inputs->is_double) {
        detr_fast::set_criterion<double>(*inputs, *weights, num_boxes, *class_loss, query_of_target, nonfinite,
                                         *results, threads);
    } else {
        detr_fast::set_criterion<float>(*inputs, *weights, num_boxes, *class_loss, query_of_target, nonfinite, *results,
                                        threads);
    }
}
