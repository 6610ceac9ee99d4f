#include "matching_cost.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../core/box.h"
#include "cost_tile.h"
#include "image_layers.h"
#include "solver.h"

namespace detr_fast {
namespace {

constexpr double largest_cost = 1e30;

// e^x for x <= 0 to 2 units in the last place, and NaN for NaN, in operations that every vector unit has (libm's is a
// call). x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial, whose next term is below 2^-27.
inline float exp_of_nonpositive(float x) {
    constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    x = x < -87.0f ? -87.0f : x;                     // e^-87 is still a normal number
    const float n = (x * 1.44269504089f + round_to_integer) - round_to_integer;
    const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t exponent = (static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, sizeof(scale));
    return p * scale;
}

inline double exp_of_nonpositive(double x) {
    return std::exp(x);
}

template <typename Real>
struct TileScratch {  // arrays of one number for each query
    Real *cx, *cy, *w, *h;
    Real* highest;  // logit
    Real* scale;    // 1 / sum of e^(logit - highest)
    Real* class_cost;

    static constexpr int64_t arrays = 7;

    TileScratch(Real* memory, int64_t queries)
        : cx(memory),
          cy(cx + queries),
          w(cy + queries),
          h(w + queries),
          highest(h + queries),
          scale(highest + queries),
          class_cost(scale + queries) {}
};

template <typename Real>
void split_boxes(const ImageLayer<Real>& image, const TileScratch<Real>& s) {
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* box = image.boxes + q * image.box_stride;
        s.cx[q] = box[0];
        s.cy[q] = box[1];
        s.w[q] = box[2];
        s.h[q] = box[3];
    }
}

template <typename Real>
void softmax_statistics(const ImageLayer<Real>& image, const TileScratch<Real>& s) {
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* __restrict__ logits = image.logits + q * image.logit_stride;
        Real highest = logits[0];
        DETR_FAST_SIMD_MAX(highest)
        for (int64_t c = 0; c < image.classes; ++c) highest = logits[c] > highest ? logits[c] : highest;
        Real sum = 0;
        DETR_FAST_PRAGMA(omp simd reduction(+ : sum))
        for (int64_t c = 0; c < image.classes; ++c) sum += exp_of_nonpositive(logits[c] - highest);
        s.highest[q] = highest;
        s.scale[q] = Real(1) / sum;
    }
}

// -p(class) of every query.
template <typename Real>
void softmax_cost(const ImageLayer<Real>& image, int64_t label, const TileScratch<Real>& s) {
    const Real* __restrict__ logits = image.logits + label;
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t q = 0; q < image.queries; ++q) {
        s.class_cost[q] = -exp_of_nonpositive(logits[q * image.logit_stride] - s.highest[q]) * s.scale[q];
    }
}

// Deformable DETR's: focal loss of the class being there, less that of it not being there.
template <typename Real>
void focal_cost(const ImageLayer<Real>& image, int64_t label, const detr_fast_cost_weights& weights,
                const TileScratch<Real>& s) {
    const Real alpha = static_cast<Real>(weights.alpha);
    const Real gamma = static_cast<Real>(weights.gamma);
    const Real epsilon = static_cast<Real>(1e-8);
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real p = Real(1) / (Real(1) + std::exp(-image.logits[q * image.logit_stride + label]));
        const Real there = alpha * std::pow(Real(1) - p, gamma) * -std::log(p + epsilon);
        const Real absent = (Real(1) - alpha) * std::pow(p, gamma) * -std::log(Real(1) - p + epsilon);
        s.class_cost[q] = there - absent;
    }
}

template <typename Real>
int32_t fill_row(const ImageLayer<Real>& image, int64_t t, const detr_fast_cost_weights& weights,
                 const TileScratch<Real>& s, Real* __restrict__ row) {
    const Real* box = image.target_boxes + 4 * t;
    const auto target = Box<Real>::of(box[0], box[1], box[2], box[3]);
    const Real cost_class = static_cast<Real>(weights.cost_class);
    const Real cost_bbox = static_cast<Real>(weights.cost_bbox);
    const Real cost_giou = static_cast<Real>(weights.cost_giou);
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t q = 0; q < image.queries; ++q) {
        const auto query = Box<Real>::of(s.cx[q], s.cy[q], s.w[q], s.h[q]);
        row[q] =
            cost_bbox * l1_distance(query, target) + cost_class * s.class_cost[q] - cost_giou * giou(query, target);
    }
    if (image.extra != nullptr) {
        const Real* __restrict__ extra = image.extra + t * image.queries;
        DETR_FAST_PRAGMA(omp simd)
        for (int64_t q = 0; q < image.queries; ++q) row[q] += extra[q];
    }
    int32_t unusable = 0;
    DETR_FAST_PRAGMA(omp simd reduction(+ : unusable))
    for (int64_t q = 0; q < image.queries; ++q) {
        unusable += !(box::magnitude(row[q]) < static_cast<Real>(largest_cost));
    }
    return unusable;
}

template <typename Real>
void replace_unusable(Real* tile, int64_t rows, int64_t columns) {
    const auto usable = [](Real cost) { return box::magnitude(cost) < static_cast<Real>(largest_cost); };
    double lowest = 0;
    double highest = 0;
    for (int64_t e = 0; e < rows * columns; ++e) {
        if (!usable(tile[e])) continue;
        lowest = std::min<double>(lowest, tile[e]);
        highest = std::max<double>(highest, tile[e]);
    }
    // More than all pairs of any matching can differ by: one such pair less is always worth it.
    const double penalty = highest + (highest - lowest + 1) * static_cast<double>(std::min(rows, columns) + 1);
    for (int64_t e = 0; e < rows * columns; ++e) {
        if (!usable(tile[e])) tile[e] = static_cast<Real>(penalty);
    }
}

template <typename Real>
int64_t fill(const ImageLayer<Real>& image, const detr_fast_cost_weights& weights, Real* tile, Real* memory) {
    const TileScratch<Real> s(memory, image.queries);
    split_boxes(image, s);
    if (!weights.focal) softmax_statistics(image, s);
    int64_t unusable = 0;
    for (int64_t t = 0; t < image.targets; ++t) {
        if (weights.focal) {
            focal_cost(image, image.labels[t], weights, s);
        } else {
            softmax_cost(image, image.labels[t], s);
        }
        unusable += fill_row(image, t, weights, s, tile + t * image.queries);
    }
    if (unusable > 0) replace_unusable(tile, image.targets, image.queries);
    return unusable;
}

}  // namespace

int64_t cost_tile_scratch(int64_t queries) {
    return TileScratch<float>::arrays * queries;
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
        const auto bytes = static_cast<size_t>(detr_fast::cost_tile_scratch(image.queries)) * sizeof(Real);
        auto* scratch = reinterpret_cast<Real*>(memory.reserve(bytes));
        Real* tile = static_cast<Real*>(cost) + first_row * image.queries;
        nonfinite[problem] = detr_fast::fill_cost_tile(image, *weights, tile, scratch);
    });
}
