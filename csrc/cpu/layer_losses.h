// From the losses of images to those of layers: what they are divided by, where their gradients lie, and their sums.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "image_layers.h"
#include "image_losses.h"
#include "set_loss.h"
#include "softmax_rows.h"

namespace detr_fast {

template <typename Real>
class LayerLosses {
  public:
    // query_of_target [L, N], or null where every target has a query, whichever.
    LayerLosses(const detr_fast_matching_inputs& in, const int64_t* query_of_target, const void* num_boxes,
                const detr_fast_class_loss& class_loss, const detr_fast_set_losses& results)
        : in_(in),
          class_loss_(class_loss),
          results_(results),
          num_boxes_(static_cast<double>(*static_cast<const Real*>(num_boxes))),
          sums_(in.layers * in.images) {
        int64_t targets = 0;
        for (int64_t b = 0; b < in.images; ++b) targets += in.num_targets[b];
        for (int64_t l = 0; l < in.layers; ++l) {
            const int64_t* of_layer = query_of_target == nullptr ? nullptr : query_of_target + l * targets;
            class_normaliser_.push_back(class_normaliser(of_layer, targets));
        }
    }

    bool needs_softmax() const { return class_loss_.kind == detr_fast_cross_entropy; }

    // Where the softmax's exponentials are to be kept, if at all: they become its gradients.
    Real* exponentials(int64_t problem) const {
        return needs_softmax() ? slope(results_.logit_slope, problem * in_.queries * in_.classes) : nullptr;
    }

    // Takes in an image at a layer; threads may do so at once. problem = layer * B + image.
    void add(const ImageLayer<Real>& image, int64_t problem, const int64_t* query_of_target,
             const SoftmaxRows<Real>& softmax) {
        const Matched<Real> matched{query_of_target,
                                    &class_loss_,
                                    static_cast<Real>(1 / class_normaliser_[problem / in_.images]),
                                    static_cast<Real>(1 / num_boxes_),
                                    slope(results_.logit_slope, problem * in_.queries * in_.classes),
                                    slope(results_.l1_slope, 4 * problem * in_.queries),
                                    slope(results_.giou_slope, 4 * problem * in_.queries)};
        sums_[problem] = image_losses(image, matched, softmax);
    }

    // Writes losses and metrics, when all images are in.
    void finish() const {
        for (int64_t l = 0; l < in_.layers; ++l) write_layer(l);
    }

  private:
    static Real* slope(void* all, int64_t offset) {
        return all == nullptr ? nullptr : static_cast<Real*>(all) + offset;
    }

    // By what a layer's class loss is divided: the weights of all queries' classes, or num_boxes.
    double class_normaliser(const int64_t* query_of_target, int64_t targets) const {
        if (!needs_softmax()) return num_boxes_;
        const auto* weight = static_cast<const Real*>(class_loss_.weight);
        double of_matched = 0;
        int64_t matched = 0;
        for (int64_t n = 0; n < targets; ++n) {
            if (query_of_target != nullptr && query_of_target[n] < 0) continue;
            of_matched += static_cast<double>(weight[in_.labels[n]]);
            ++matched;
        }
        const int64_t unmatched = in_.images * in_.queries - matched;
        return of_matched + static_cast<double>(unmatched) * static_cast<double>(weight[in_.classes - 1]);
    }

    void write_layer(int64_t layer) const {
        LossSums total{};
        double miscounted = 0;
        for (int64_t b = 0; b < in_.images; ++b) {  // in the order of images, whichever thread was first
            const LossSums& image = sums_[layer * in_.images + b];
            total.class_loss += image.class_loss;
            total.l1 += image.l1;
            total.giou += image.giou;
            total.matched += image.matched;
            total.correct += image.correct;
            miscounted += std::abs(static_cast<double>(image.objects - in_.num_targets[b]));
        }
        auto* losses = static_cast<Real*>(results_.losses) + layer;
        auto* metrics = static_cast<Real*>(results_.metrics) + layer;
        const auto matched = static_cast<double>(std::max<int64_t>(total.matched, 1));
        losses[0] = static_cast<Real>(total.class_loss / class_normaliser_[layer]);
        losses[in_.layers] = static_cast<Real>(total.l1 / num_boxes_);
        losses[2 * in_.layers] = static_cast<Real>(total.giou / num_boxes_);
        metrics[0] = static_cast<Real>(100 - 100 * static_cast<double>(total.correct) / matched);
        metrics[in_.layers] = static_cast<Real>(miscounted / static_cast<double>(in_.images));
    }

    const detr_fast_matching_inputs& in_;
    const detr_fast_class_loss& class_loss_;
    const detr_fast_set_losses& results_;
    double num_boxes_;
    std::vector<double> class_normaliser_;  // [L]
    std::vector<LossSums> sums_;            // [L, B]
};

}  // namespace detr_fast
