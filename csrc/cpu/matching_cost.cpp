#include "matching_cost.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../core/box.h"
#include "../core/pair_cost.h"
#include "cost_tile.h"
#include "image_layers.h"
#include "solver.h"
#include "vectors.h"
#include "widths.h"

namespace detr_fast {
namespace {

template <typename Real>
struct TileScratch {  // arrays of one number for each query
    Real *cx, *cy, *w, *h;
    Real *x0, *y0, *x1, *y1;
    Real* area;
    Real* scale;       // 1 / the softmax's sum
    Real* class_cost;  // [T, Q]; a row for each label, at the first target that has it

    static constexpr int64_t arrays = 10;

    TileScratch(Real* memory, int64_t queries) {
        Real** const all[arrays] = {&cx, &cy, &w, &h, &x0, &y0, &x1, &y1, &area, &scale};
        for (Real** array : all) {
            *array = memory;
            memory += queries;
        }
        class_cost = memory;
    }
};

// Calls look_at(q) for every query, whole vectors at a time: the last ones are looked at twice rather than one by one.
template <int width, typename LookAt>
DETR_FAST_INLINE void for_each_query(int64_t queries, const LookAt& look_at) {
    if (queries < width) {
        for (int64_t q = 0; q < queries; ++q) look_at(q);
        return;
    }
    for (int64_t q = 0; q < queries; q += width) {
        const int64_t first = std::min(q, queries - width);
        DETR_FAST_PRAGMA(omp simd)
        for (int64_t lane = 0; lane < width; ++lane) look_at(first + lane);
    }
}

template <int width, typename Real>
DETR_FAST_INLINE void split_boxes(const Real* __restrict__ boxes, int64_t stride, int64_t queries,
                                  const TileScratch<Real>& s) {
    for_each_query<width>(queries, [=](int64_t q) {
        const Real* coordinates = boxes + q * stride;
        const auto box = Box<Real>::of(coordinates[0], coordinates[1], coordinates[2], coordinates[3]);
        s.cx[q] = box.cx;
        s.cy[q] = box.cy;
        s.w[q] = box.w;
        s.h[q] = box.h;
        s.x0[q] = box.x0;
        s.y0[q] = box.y0;
        s.x1[q] = box.x1;
        s.y1[q] = box.y1;
        s.area[q] = box.area;
    });
}

// -p(class) of every query.
template <int width, typename Real>
void softmax_cost(const ImageLayer<Real>& image, int64_t label, const SoftmaxRows<Real>& softmax,
                  const Real* __restrict__ scale, Real* __restrict__ class_cost) {
    if (softmax.exponentials != nullptr) {
        const Real* __restrict__ exponentials = softmax.exponentials + label;
        const int64_t stride = image.classes;
        for_each_query<width>(image.queries, [=](int64_t q) { class_cost[q] = -exponentials[q * stride] * scale[q]; });
        return;
    }
    const Real* __restrict__ logits = image.logits + label;
    const Real* __restrict__ highest = softmax.highest;
    const int64_t stride = image.logit_stride;
    for_each_query<width>(image.queries, [=](int64_t q) {
        class_cost[q] = -exp_of_nonpositive(logits[q * stride] - highest[q]) * scale[q];
    });
}

// The same of doubles, and of a power that grows as the probability falls.
template <int, typename Real>
void focal_cost(const ImageLayer<Real>& image, int64_t label, const detr_fast_cost_weights& weights,
                Real* __restrict__ class_cost) {
    const Real alpha = static_cast<Real>(weights.alpha);
    const Real gamma = static_cast<Real>(weights.gamma);
    for (int64_t q = 0; q < image.queries; ++q) {
        class_cost[q] = focal_class_cost(image.logits[q * image.logit_stride + label], alpha, gamma);
    }
}

// core/pair_cost.h's in operations that vector units have: with libm's powers and logarithms the whole
// cost takes 15 times as long (300 queries, 20 targets).
// power(p, -log p) is p^gamma.
template <int width, typename Power>
DETR_FAST_INLINE void focal_cost_with(const ImageLayer<float>& image, int64_t label, float alpha, const Power& power,
                                      float* __restrict__ class_cost) {
    constexpr float epsilon = 1e-8f;
    const float* __restrict__ logits = image.logits + label;
    const int64_t stride = image.logit_stride;
    for_each_query<width>(image.queries, [=](int64_t q) {
        const float x = logits[q * stride];
        const float of_negative = x > 0.0f ? -x : x;
        // A finite logarithm of 0, which a power of 0 may be multiplied with.
        const float below = exponential::lowest > of_negative ? exponential::lowest : of_negative;
        const float e = exp_of_nonpositive(below);
        const float larger = 1.0f / (1.0f + e);
        const float smaller = e * larger;
        const float minus_log_larger = log_of_one_plus(e);
        const float minus_log_smaller = minus_log_larger - below;
        // Of the larger one epsilon takes no more than the last bit, unless it is all that there is.
        const float larger_log = minus_log_larger - epsilon * (1.0f + e);
        const float smaller_log = -log_of_normal(smaller + epsilon);
        const float of_larger = power(larger, minus_log_larger);
        const float of_smaller = power(smaller, minus_log_smaller);
        const float there = alpha * (x > 0.0f ? of_smaller * larger_log : of_larger * smaller_log);
        const float absent = (1.0f - alpha) * (x > 0.0f ? of_larger * smaller_log : of_smaller * larger_log);
        class_cost[q] = there - absent;
    });
}

template <int width>
void focal_cost(const ImageLayer<float>& image, int64_t label, const detr_fast_cost_weights& weights,
                float* __restrict__ class_cost) {
    const auto alpha = static_cast<float>(weights.alpha);
    const auto gamma = static_cast<float>(weights.gamma);
    if (gamma == 2.0f) {
        focal_cost_with<width>(image, label, alpha, [](float p, float) { return p * p; }, class_cost);
    } else if (gamma >= 0.0f) {
        const auto power = [=](float, float minus_log_p) { return exp_of_nonpositive(-gamma * minus_log_p); };
        focal_cost_with<width>(image, label, alpha, power, class_cost);
    } else {
        focal_cost<width, float>(image, label, weights, class_cost);
    }
}

// The class costs of target t, computed once for all targets of one label: images of many objects have few classes.
template <int width, typename Real>
const Real* class_costs(const ImageLayer<Real>& image, int64_t t, const detr_fast_cost_weights& weights,
                        const SoftmaxRows<Real>& softmax, const TileScratch<Real>& s) {
    const int64_t first = std::find(image.labels, image.labels + t, image.labels[t]) - image.labels;
    Real* row = s.class_cost + first * image.queries;
    if (first < t) return row;
    if (weights.focal) {
        focal_cost<width>(image, image.labels[t], weights, row);
    } else {
        softmax_cost<width>(image, image.labels[t], softmax, s.scale, row);
    }
    return row;
}

// Returns how many costs are unusable.
template <int width, typename Real>
int64_t fill_row(const ImageLayer<Real>& image, int64_t t, const detr_fast_cost_weights& weights,
                 const SoftmaxRows<Real>& softmax, const TileScratch<Real>& s, Real* __restrict__ row) {
    const Real* coordinates = image.target_boxes + 4 * t;
    const auto target = Box<Real>::of(coordinates[0], coordinates[1], coordinates[2], coordinates[3]);
    const auto pair_weights = PairWeights<Real>::of(weights);
    const Real* __restrict__ class_cost = class_costs<width>(image, t, weights, softmax, s);
    const auto cost = [&](int64_t q) {
        const Box<Real> query{s.cx[q], s.cy[q], s.w[q], s.h[q], s.x0[q], s.y0[q], s.x1[q], s.y1[q], s.area[q]};
        return pair_cost(pair_weights, query, target, class_cost[q]);
    };
    if (image.extra == nullptr) {
        for_each_query<width>(image.queries, [&](int64_t q) { row[q] = cost(q); });
    } else {
        const Real* __restrict__ extra = image.extra + t * image.queries;
        for_each_query<width>(image.queries, [&](int64_t q) { row[q] = cost(q) + extra[q]; });
    }
    int32_t unusable = 0;
    DETR_FAST_PRAGMA(omp simd reduction(+ : unusable))
    for (int64_t q = 0; q < image.queries; ++q) unusable += !is_usable(row[q]);
    return unusable;
}

template <typename Real>
void replace_unusable(Real* tile, int64_t rows, int64_t columns) {
    double lowest = 0;
    double highest = 0;
    for (int64_t e = 0; e < rows * columns; ++e) {
        if (!is_usable(tile[e])) continue;
        lowest = std::min<double>(lowest, tile[e]);
        highest = std::max<double>(highest, tile[e]);
    }
    const auto instead = static_cast<Real>(penalty(lowest, highest, columns, rows));
    for (int64_t e = 0; e < rows * columns; ++e) {
        if (!is_usable(tile[e])) tile[e] = instead;
    }
}

template <int Bytes, typename Real>
int64_t fill(const ImageLayer<Real>& image, const detr_fast_cost_weights& weights, const SoftmaxRows<Real>& softmax,
             Real* tile, Real* memory) {
    const TileScratch<Real> s(memory, image.queries);
    constexpr int width = Bytes / sizeof(Real);
    if (image.box_stride == 4) {  // told apart so that the compiler knows the stride
        split_boxes<width>(image.boxes, 4, image.queries, s);
    } else {
        split_boxes<width>(image.boxes, image.box_stride, image.queries, s);
    }
    if (!weights.focal) {
        for_each_query<width>(image.queries, [=](int64_t q) { s.scale[q] = Real(1) / softmax.sum[q]; });
    }
    int64_t unusable = 0;
    for (int64_t t = 0; t < image.targets; ++t)
        unusable += fill_row<width>(image, t, weights, softmax, s, tile + t * image.queries);
    if (unusable > 0) replace_unusable(tile, image.targets, image.queries);
    return unusable;
}

template <typename Real>
struct Fill {
    const ImageLayer<Real>& image;
    const detr_fast_cost_weights& weights;
    const SoftmaxRows<Real>& softmax;
    Real* tile;
    Real* scratch;

    template <int Bytes>
    int64_t run() const {
        return fill<Bytes>(image, weights, softmax, tile, scratch);
    }
};

}  // namespace

int64_t cost_tile_scratch(int64_t queries, int64_t targets) {
    return (TileScratch<float>::arrays + targets) * queries;
}

int64_t fill_cost_tile(const ImageLayer<float>& image, const detr_fast_cost_weights& weights,
                       const SoftmaxRows<float>& softmax, float* tile, float* scratch) {
    return with_widest_vectors(Fill<float>{image, weights, softmax, tile, scratch});
}

int64_t fill_cost_tile(const ImageLayer<double>& image, const detr_fast_cost_weights& weights,
                       const SoftmaxRows<double>& softmax, double* tile, double* scratch) {
    return with_widest_vectors(Fill<double>{image, weights, softmax, tile, scratch});
}

}  // namespace detr_fast

void detr_fast_matching_cost_cpu(const detr_fast_matching_inputs* inputs, const detr_fast_cost_weights* weights,
                                 void* cost, int64_t* nonfinite, int threads) {
    detr_fast::for_each_image_layer(*inputs, threads, [&](const auto& image, int64_t problem, int64_t first_row) {
        using Real = std::decay_t<decltype(*image.logits)>;
        nonfinite[problem] = 0;
        if (image.targets == 0) return;
        static thread_local detr_fast::Scratch memory;
        const auto bytes =
            static_cast<size_t>(detr_fast::cost_tile_scratch(image.queries, image.targets)) * sizeof(Real);
        auto* scratch = reinterpret_cast<Real*>(memory.reserve(bytes));
        Real* tile = static_cast<Real*>(cost) + first_row * image.queries;
        const auto softmax = detr_fast::SoftmaxRows<Real>::of_thread(image.queries, nullptr);
        if (!weights->focal) fill_softmax_rows(image, softmax);
        nonfinite[problem] = detr_fast::fill_cost_tile(image, *weights, softmax, tile, scratch);
    });
}
