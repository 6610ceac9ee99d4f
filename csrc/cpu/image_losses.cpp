#include "image_losses.h"

#include <algorithm>
#include <cmath>

#include "../core/set_loss.h"
#include "class_loss.h"
#include "solver.h"
#include "widths.h"

namespace detr_fast {
namespace {

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
void cross_entropy(const ImageLayer<Real>& image, const Matched<Real>& matched, const SoftmaxRows<Real>& softmax,
                   const int32_t* target_of_query, LossSums& sums) {
    const auto* weight = static_cast<const Real*>(matched.class_loss->weight);
    const int64_t no_object = image.classes - 1;
    LogOfProduct unmatched;
    double of_unmatched = 0;
    double of_matched = 0;
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* logits = image.logits + q * image.logit_stride;
        const int32_t t = target_of_query[q];
        const int64_t label = t < 0 ? no_object : image.labels[t];
        const Real highest = softmax.highest[q];
        const auto sum = static_cast<double>(softmax.sum[q]);
        if (matched.logit_slope != nullptr) {
            const Real factor = weight[label] * matched.per_class_loss;
            Real* slope = matched.logit_slope + q * image.classes;
            scale_row<Bytes>(slope, image.classes, factor / softmax.sum[q]);
            slope[label] -= factor;
        }
        const double below_highest = static_cast<double>(highest) - static_cast<double>(logits[label]);
        if (t < 0) {
            of_unmatched += below_highest;
            unmatched.times(sum);
        } else {
            of_matched += static_cast<double>(weight[label]) * (below_highest + std::log(sum));
            sums.correct += is_first_highest(logits, label, highest);
        }
        sums.objects += !is_first_highest(logits, no_object, highest);
    }
    sums.class_loss = of_matched;
    if (sums.matched < image.queries) {  // else a weight that is no number would count
        sums.class_loss += static_cast<double>(weight[no_object]) * (of_unmatched + unmatched.log());
    }
}

template <int Bytes, typename Real>
void sigmoid_loss(const ImageLayer<Real>& image, const Matched<Real>& matched, const int32_t* target_of_query,
                  const Real* iou_of_target, LossSums& sums) {
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
void box_losses(const ImageLayer<Real>& image, const Matched<Real>& matched, Real* iou_of_target, LossSums& sums) {
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

template <typename Real>
struct Losses {
    const ImageLayer<Real>& image;
    const Matched<Real>& matched;
    const SoftmaxRows<Real>& softmax;
    int32_t* target_of_query;
    Real* iou_of_target;

    template <int Bytes>
    LossSums run() const {
        LossSums sums{};
        std::fill_n(target_of_query, image.queries, -1);
        for (int64_t t = 0; t < image.targets; ++t) {
            if (matched.query_of_target[t] < 0) continue;
            target_of_query[matched.query_of_target[t]] = static_cast<int32_t>(t);
            ++sums.matched;
        }
        box_losses(image, matched, iou_of_target, sums);
        if (matched.class_loss->kind == detr_fast_cross_entropy) {
            cross_entropy<Bytes>(image, matched, softmax, target_of_query, sums);
        } else {
            sigmoid_loss<Bytes>(image, matched, target_of_query, iou_of_target, sums);
        }
        return sums;
    }
};

template <typename Real>
LossSums losses(const ImageLayer<Real>& image, const Matched<Real>& matched, const SoftmaxRows<Real>& softmax) {
    static thread_local Scratch memory;
    const auto ints = static_cast<size_t>(image.queries) * sizeof(int32_t);
    const size_t aligned = (ints + 63) / 64 * 64;
    unsigned char* at = memory.reserve(aligned + static_cast<size_t>(image.targets) * sizeof(Real));
    return with_widest_vectors(
        Losses<Real>{image, matched, softmax, reinterpret_cast<int32_t*>(at), reinterpret_cast<Real*>(at + aligned)});
}

}  // namespace

LossSums image_losses(const ImageLayer<float>& image, const Matched<float>& matched,
                      const SoftmaxRows<float>& softmax) {
    return losses(image, matched, softmax);
}

LossSums image_losses(const ImageLayer<double>& image, const Matched<double>& matched,
                      const SoftmaxRows<double>& softmax) {
    return losses(image, matched, softmax);
}

}  // namespace detr_fast
