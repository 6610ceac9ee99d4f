#include "matching_cost.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../core/box.h"
#include "../core/pair_cost.h"
#include "cost_tile.h"
#include "floats.h"
#include "image_layers.h"
#include "solver.h"

namespace detr_fast {
namespace {

template <typename Real>
struct TileScratch {  // arrays of one number for each query
    Real *cx, *cy, *w, *h;
    Real *x0, *y0, *x1, *y1;
    Real* area;
    Real* highest;     // logit
    Real* scale;       // 1 / sum of e^(logit - highest)
    Real* class_cost;  // [T, Q]; a row for each label, at the first target that has it

    static constexpr int64_t arrays = 11;

    TileScratch(Real* memory, int64_t queries) {
        Real** const all[arrays] = {&cx, &cy, &w, &h, &x0, &y0, &x1, &y1, &area, &highest, &scale};
        for (Real** array : all) {
            *array = memory;
            memory += queries;
        }
        class_cost = memory;
    }
};

template <typename Real>
void split_boxes(const ImageLayer<Real>& image, const TileScratch<Real>& s) {
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* coordinates = image.boxes + q * image.box_stride;
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
    }
}

template <typename Real>
void softmax_statistics(const ImageLayer<Real>& image, const TileScratch<Real>& s) {
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* __restrict__ logits = image.logits + q * image.logit_stride;
        Real highest = logits[0];
        for (int64_t c = 1; c < image.classes; ++c) highest = logits[c] > highest ? logits[c] : highest;
        Real sum = 0;
        for (int64_t c = 0; c < image.classes; ++c) sum += exp_of_nonpositive(logits[c] - highest);
        s.highest[q] = highest;
        s.scale[q] = Real(1) / sum;
    }
}

#if defined(DETR_FAST_HAS_FLOATS)
// The same with sixteen partial maxima and sums. What is left of a row is filled up with -inf, which adds e^-87.
inline void softmax_statistics(const ImageLayer<float>& image, const TileScratch<float>& s) {
    constexpr Higher higher;
    constexpr Add add;
    const int64_t whole = image.classes / num_floats * num_floats;
    const int64_t rest = image.classes - whole;
    float filled[num_floats];
    std::fill_n(filled, num_floats, -std::numeric_limits<float>::infinity());
    for (int64_t q = 0; q < image.queries; ++q) {
        const float* logits = image.logits + q * image.logit_stride;
        std::copy_n(logits + whole, rest, filled);
        const Floats last = load(filled);
        Floats highest = last;
        for (int64_t c = 0; c < whole; c += num_floats) highest = higher(load(logits + c), highest);
        s.highest[q] = reduce(highest, higher);
        Floats sum = exp_of_nonpositive(last - s.highest[q]);
        for (int64_t c = 0; c < whole; c += num_floats) sum += exp_of_nonpositive(load(logits + c) - s.highest[q]);
        s.scale[q] = 1.0f / reduce(sum, add);
    }
}
#endif

// -p(class) of every query.
template <typename Real>
void softmax_cost(const ImageLayer<Real>& image, int64_t label, const TileScratch<Real>& s,
                  Real* __restrict__ class_cost) {
    const Real* __restrict__ logits = image.logits + label;
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t q = 0; q < image.queries; ++q) {
        class_cost[q] = -exp_of_nonpositive(logits[q * image.logit_stride] - s.highest[q]) * s.scale[q];
    }
}

template <typename Real>
void focal_cost(const ImageLayer<Real>& image, int64_t label, const detr_fast_cost_weights& weights,
                Real* __restrict__ class_cost) {
    const Real alpha = static_cast<Real>(weights.alpha);
    const Real gamma = static_cast<Real>(weights.gamma);
    for (int64_t q = 0; q < image.queries; ++q) {
        class_cost[q] = focal_class_cost(image.logits[q * image.logit_stride + label], alpha, gamma);
    }
}

// The class costs of target t, computed once for all targets of one label: images of many objects have few classes.
template <typename Real>
const Real* class_costs(const ImageLayer<Real>& image, int64_t t, const detr_fast_cost_weights& weights,
                        const TileScratch<Real>& s) {
    const int64_t first = std::find(image.labels, image.labels + t, image.labels[t]) - image.labels;
    Real* row = s.class_cost + first * image.queries;
    if (first < t) return row;
    if (weights.focal) {
        focal_cost(image, image.labels[t], weights, row);
    } else {
        softmax_cost(image, image.labels[t], s, row);
    }
    return row;
}

template <typename Real>
int32_t fill_row(const ImageLayer<Real>& image, int64_t t, const detr_fast_cost_weights& weights,
                 const TileScratch<Real>& s, Real* __restrict__ row) {
    const Real* coordinates = image.target_boxes + 4 * t;
    const auto target = Box<Real>::of(coordinates[0], coordinates[1], coordinates[2], coordinates[3]);
    const auto pair_weights = PairWeights<Real>::of(weights);
    const Real* __restrict__ class_cost = class_costs(image, t, weights, s);
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t q = 0; q < image.queries; ++q) {
        const Box<Real> query{s.cx[q], s.cy[q], s.w[q], s.h[q], s.x0[q], s.y0[q], s.x1[q], s.y1[q], s.area[q]};
        row[q] = pair_cost(pair_weights, query, target, class_cost[q]);
    }
    if (image.extra != nullptr) {
        const Real* __restrict__ extra = image.extra + t * image.queries;
        DETR_FAST_PRAGMA(omp simd)
        for (int64_t q = 0; q < image.queries; ++q) row[q] += extra[q];
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

template <typename Real>
int64_t fill(const ImageLayer<Real>& image, const detr_fast_cost_weights& weights, Real* tile, Real* memory) {
    const TileScratch<Real> s(memory, image.queries);
    split_boxes(image, s);
    if (!weights.focal) softmax_statistics(image, s);
    int64_t unusable = 0;
    for (int64_t t = 0; t < image.targets; ++t) unusable += fill_row(image, t, weights, s, tile + t * image.queries);
    if (unusable > 0) replace_unusable(tile, image.targets, image.queries);
    return unusable;
}

}  // namespace

int64_t cost_tile_scratch(int64_t queries, int64_t targets) {
    return (TileScratch<float>::arrays + targets) * queries;
}

DETR_FAST_CLONES int64_t fill_cost_tile(const ImageLayer<float>& image, const detr_fast_cost_weights& weights,
                                        float* tile, float* scratch) {
    return fill(image, weights, tile, scratch);
}

DETR_FAST_CLONES int64_t fill_cost_tile(const ImageLayer<double>& image, const detr_fast_cost_weights& weights,
                                        double* tile, double* scratch) {
    return fill(image, weights, tile, scratch);
}

}  // namespace detr_fast

void detr_fast_matching_cost_cpu(const detr_fast_matching_inputs* inputs, const detr_fast_cost_weights* weights,
                                 void* cost, int64_t* nonfinite, int threads) {
    detr_fast::for_each_image_layer(*inputs, threads, [&](const auto& image, int64_t problem, int64_t first_row) {
        using Real = std::decay_t<decltype(*image.logits)>;
        static thread_local detr_fast::Scratch memory;
        const auto bytes =
            static_cast<size_t>(detr_fast::cost_tile_scratch(image.queries, image.targets)) * sizeof(Real);
        auto* scratch = reinterpret_cast<Real*>(memory.reserve(bytes));
        Real* tile = static_cast<Real*>(cost) + first_row * image.queries;
        nonfinite[problem] = detr_fast::fill_cost_tile(image, *weights, tile, scratch);
    });
}
