#include "set_loss.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../core/set_loss.h"
#include "class_loss.h"
#include "image_layers.h"
#include "solver.h"
#include "widths.h"

namespace detr_fast {
namespace {

struct Sums {  // over the queries of an image at a layer
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

// Adds up logarithms of numbers >= 1 as one of their product.
class LogOfProduct {
  public:
    void times(double factor) {
        product_ *= factor;
        if (product_ > large) {
            log_ += std::log(product_);
            product_ = 1;
        }
    }

    double log() const { return log_ + std::log(product_); }

  private:
    static constexpr double large = 1e250;  // times any float's sum of exponentials: still a double
    double product_ = 1;
    double log_ = 0;
};

// Whether a place of a row is the first of its highest numbers, which argmax would find.
template <typename Real>
bool is_first_highest(const Real* row, int64_t place, Real highest) {
    return row[place] == highest && std::find(row, row + place, highest) == row + place;
}

template <int Bytes, typename Real>
void cross_entropy(const ImageLayer<Real>& image, const Matched<Real>& matched, const int32_t* target_of_query,
                   Sums& sums) {
    const auto* weight = static_cast<const Real*>(matched.class_loss->weight);
    const int64_t no_object = image.classes - 1;
    LogOfProduct unmatched;
    double of_unmatched = 0;
    double of_matched = 0;
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* logits = image.logits + q * image.logit_stride;
        const int32_t t = target_of_query[q];
        const int64_t label = t < 0 ? no_object : image.labels[t];
        const Real factor = weight[label] * matched.per_class_loss;
        Real* slope = matched.logit_slope == nullptr ? nullptr : matched.logit_slope + q * image.classes;
        const auto row = softmax_row<Bytes>(logits, image.classes, factor, slope);
        if (slope != nullptr) slope[label] -= factor;
        const double below_highest = static_cast<double>(row.highest) - static_cast<double>(logits[label]);
        if (t < 0) {
            of_unmatched += below_highest;
            unmatched.times(static_cast<double>(row.sum));
        } else {
            of_matched += static_cast<double>(weight[label]) * (below_highest + std::log(static_cast<double>(row.sum)));
            sums.correct += is_first_highest(logits, label, row.highest);
        }
        sums.objects += !is_first_highest(logits, no_object, row.highest);
    }
    sums.class_loss = of_matched;
    if (sums.matched < image.queries) {  // else a weight that is no number would count
        sums.class_loss += static_cast<double>(weight[no_object]) * (of_unmatched + unmatched.log());
    }
}

template <int Bytes, typename Real>
void sigmoid_loss(const ImageLayer<Real>& image, const Matched<Real>& matched, const int32_t* target_of_query,
                  const Real* iou_of_target, Sums& sums) {
    const auto& options = *matched.class_loss;
    const SigmoidLoss<Real> sigmoid{options.kind == detr_fast_varifocal, static_cast<Real>(options.alpha),
                                    static_cast<Real>(options.gamma)};
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* logits = image.logits + q * image.logit_stride;
        const int32_t t = target_of_query[q];
        const int64_t label = t < 0 ? -1 : image.labels[t];
        Real* slope = matched.logit_slope == nullptr ? nullptr : matched.logit_slope + q * image.classes;
        const auto row = sigmoid_row<Bytes>(logits, image.classes, label, sigmoid, matched.per_class_loss, slope);
        sums.class_loss += row.loss;
        sums.objects += row.highest > Real(0);
        if (t < 0) continue;
        const auto there = sigmoid.present(logits[label], iou_of_target[t]);
        sums.class_loss += static_cast<double>(there.loss);
        sums.correct += is_first_highest(logits, label, row.highest);
        if (slope != nullptr) slope[label] = matched.per_class_loss * there.slope;
    }
}

template <typename Real>
void box_losses(const ImageLayer<Real>& image, const Matched<Real>& matched, Real* iou_of_target, Sums& sums) {
    if (matched.l1_slope != nullptr) {
        std::fill_n(matched.l1_slope, 4 * image.queries, Real(0));
        std::fill_n(matched.giou_slope, 4 * image.queries, Real(0));
    }
    for (int64_t t = 0; t < image.targets; ++t) {
        const int64_t q = matched.query_of_target[t];
        if (q < 0) continue;
        const Real* a = image.boxes + q * image.box_stride;
        const Real* b = image.target_boxes + 4 * t;
        const auto pair = pair_loss_of(Box<Real>::of(a[0], a[1], a[2], a[3]), Box<Real>::of(b[0], b[1], b[2], b[3]));
        sums.l1 += static_cast<double>(pair.l1);
        sums.giou += static_cast<double>(pair.giou);
        iou_of_target[t] = pair.iou;
        if (matched.l1_slope == nullptr) continue;
        for (int64_t k = 0; k < 4; ++k) {
            matched.l1_slope[4 * q + k] = pair.l1_slope[k] * matched.per_box;
            matched.giou_slope[4 * q + k] = pair.giou_slope[k] * matched.per_box;
        }
    }
}

template <int Bytes, typename Real>
Sums losses_of_image(const ImageLayer<Real>& image, const Matched<Real>& matched, int32_t* target_of_query,
                     Real* iou_of_target) {
    Sums sums{};
    std::fill_n(target_of_query, image.queries, -1);
    for (int64_t t = 0; t < image.targets; ++t) {
        if (matched.query_of_target[t] < 0) continue;
        target_of_query[matched.query_of_target[t]] = static_cast<int32_t>(t);
        ++sums.matched;
    }
    box_losses(image, matched, iou_of_target, sums);
    if (matched.class_loss->kind == detr_fast_cross_entropy) {
        cross_entropy<Bytes>(image, matched, target_of_query, sums);
    } else {
        sigmoid_loss<Bytes>(image, matched, target_of_query, iou_of_target, sums);
    }
    return sums;
}

template <typename Real>
struct Losses {
    const ImageLayer<Real>& image;
    const Matched<Real>& matched;
    int32_t* target_of_query;
    Real* iou_of_target;

    template <int Bytes>
    Sums run() const {
        return losses_of_image<Bytes>(image, matched, target_of_query, iou_of_target);
    }
};

// By what a layer's class loss is divided: the weights of all queries' classes, or num_boxes.
template <typename Real>
double class_normaliser(const detr_fast_matching_inputs& in, const int64_t* query_of_target, double num_boxes,
                        const detr_fast_class_loss& class_loss) {
    if (class_loss.kind != detr_fast_cross_entropy) return num_boxes;
    const auto* weight = static_cast<const Real*>(class_loss.weight);
    int64_t targets = 0;
    for (int64_t b = 0; b < in.images; ++b) targets += in.num_targets[b];
    double of_matched = 0;
    int64_t matched = 0;
    for (int64_t n = 0; n < targets; ++n) {
        if (query_of_target[n] < 0) continue;
        of_matched += static_cast<double>(weight[in.labels[n]]);
        ++matched;
    }
    return of_matched +
           static_cast<double>(in.images * in.queries - matched) * static_cast<double>(weight[in.classes - 1]);
}

template <typename Real>
void write_layer(const detr_fast_matching_inputs& in, int64_t layer, const Sums* sums, double class_normaliser,
                 double num_boxes, const detr_fast_set_losses& results) {
    Sums total{};
    double miscounted = 0;
    for (int64_t b = 0; b < in.images; ++b) {  // in the order of images, whichever thread was first
        const Sums& image = sums[b];
        total.class_loss += image.class_loss;
        total.l1 += image.l1;
        total.giou += image.giou;
        total.matched += image.matched;
        total.correct += image.correct;
        miscounted += std::abs(static_cast<double>(image.objects - in.num_targets[b]));
    }
    auto* losses = static_cast<Real*>(results.losses) + layer;
    auto* metrics = static_cast<Real*>(results.metrics) + layer;
    const auto matched = static_cast<double>(std::max<int64_t>(total.matched, 1));
    losses[0] = static_cast<Real>(total.class_loss / class_normaliser);
    losses[in.layers] = static_cast<Real>(total.l1 / num_boxes);
    losses[2 * in.layers] = static_cast<Real>(total.giou / num_boxes);
    metrics[0] = static_cast<Real>(100 - 100 * static_cast<double>(total.correct) / matched);
    metrics[in.layers] = static_cast<Real>(miscounted / static_cast<double>(in.images));
}

template <typename Real>
void set_loss(const detr_fast_matching_inputs& in, const int64_t* query_of_target, double num_boxes,
              const detr_fast_class_loss& class_loss, const detr_fast_set_losses& results, int threads) {
    int64_t targets = 0;
    for (int64_t b = 0; b < in.images; ++b) targets += in.num_targets[b];
    std::vector<double> normaliser(in.layers);
    for (int64_t l = 0; l < in.layers; ++l) {
        normaliser[l] = class_normaliser<Real>(in, query_of_target + l * targets, num_boxes, class_loss);
    }
    std::vector<Sums> sums(in.layers * in.images);
    const auto slope_of = [](void* all, int64_t offset) {
        return all == nullptr ? nullptr : static_cast<Real*>(all) + offset;
    };
    for_each_image_layer_of<Real>(in, threads, [&](const auto& image, int64_t problem, int64_t first_target) {
        static thread_local Scratch memory;
        const auto ints = static_cast<size_t>(image.queries) * sizeof(int32_t);
        const size_t aligned = (ints + 63) / 64 * 64;
        unsigned char* at = memory.reserve(aligned + static_cast<size_t>(image.targets) * sizeof(Real));
        const Matched<Real> matched{query_of_target + first_target,
                                    &class_loss,
                                    static_cast<Real>(1 / normaliser[problem / in.images]),
                                    static_cast<Real>(1 / num_boxes),
                                    slope_of(results.logit_slope, problem * in.queries * in.classes),
                                    slope_of(results.l1_slope, 4 * problem * in.queries),
                                    slope_of(results.giou_slope, 4 * problem * in.queries)};
        sums[problem] = with_widest_vectors(
            Losses<Real>{image, matched, reinterpret_cast<int32_t*>(at), reinterpret_cast<Real*>(at + aligned)});
    });
    for (int64_t l = 0; l < in.layers; ++l) {
        write_layer<Real>(in, l, sums.data() + l * in.images, normaliser[l], num_boxes, results);
    }
}

}  // namespace
}  // namespace detr_fast

void detr_fast_set_loss_cpu(const detr_fast_matching_inputs* inputs, const int64_t* query_of_target,
                            const void* num_boxes, const detr_fast_class_loss* class_loss,
                            const detr_fast_set_losses* results, int threads) {
    if (inputs->is_double) {
        const double boxes = *static_cast<const double*>(num_boxes);
        detr_fast::set_loss<double>(*inputs, query_of_target, boxes, *class_loss, *results, threads);
    } else {
        const double boxes = *static_cast<const float*>(num_boxes);
        detr_fast::set_loss<float>(*inputs, query_of_target, boxes, *class_loss, *results, threads);
    }
}
