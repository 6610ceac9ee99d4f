#include <algorithm>

#include "set_loss.h"
#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

// Numbers that one thread scales in about 20 microseconds, which waking another takes.
constexpr int64_t chunk = 1 << 16;

// Results may take the place of what they are computed from, number by number.
template <typename Real>
void scale(const Real* from, Real factor, int64_t count, Real* to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
}

template <typename Real>
void add_scaled(const Real* a, Real factor_a, const Real* b, Real factor_b, int64_t count, Real* to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = factor_a * a[i] + factor_b * b[i];
}

DETR_FAST_CLONES void scaled(const float* from, float factor, int64_t count, float* to) {
    scale(from, factor, count, to);
}

DETR_FAST_CLONES void scaled(const double* from, double factor, int64_t count, double* to) {
    scale(from, factor, count, to);
}

DETR_FAST_CLONES void scaled_sum(const float* a, float factor_a, const float* b, float factor_b, int64_t count,
                                 float* to) {
    add_scaled(a, factor_a, b, factor_b, count, to);
}

DETR_FAST_CLONES void scaled_sum(const double* a, double factor_a, const double* b, double factor_b, int64_t count,
                                 double* to) {
    add_scaled(a, factor_a, b, factor_b, count, to);
}

template <typename Real>
void backward(const int64_t* elements, int64_t layers, const Real* upstream, const detr_fast_set_losses& saved,
              Real* logit_gradient, Real* box_gradient, int threads) {
    const auto* logit = static_cast<const Real*>(saved.logit_slope);
    const auto* l1 = static_cast<const Real*>(saved.l1_slope);
    const auto* giou = static_cast<const Real*>(saved.giou_slope);
    for (int64_t l = 0; l < layers; ++l) {
        const int64_t first = l * elements[1];
        scaled_sum(l1 + first, upstream[layers + l], giou + first, upstream[2 * layers + l], elements[1],
                   box_gradient + first);
    }
    const auto is_one = [](Real factor) { return factor == Real(1); };
    if (logit_gradient == logit && std::all_of(upstream, upstream + layers, is_one)) return;
    const int64_t chunks = (elements[0] + chunk - 1) / chunk;
    parallel_for(layers * chunks, static_cast<int>(std::min<int64_t>(threads, layers * chunks)), [&](int64_t task) {
        const int64_t layer = task / chunks;
        const int64_t first = task % chunks * chunk;
        const int64_t offset = layer * elements[0] + first;
        const int64_t count = std::min(chunk, elements[0] - first);
        scaled(logit + offset, upstream[layer], count, logit_gradient + offset);
    });
}

}  // namespace
}  // namespace detr_fast

void detr_fast_set_loss_backward_cpu(int is_double, const int64_t* elements, int64_t layers, const void* upstream,
                                     const detr_fast_set_losses* saved, void* logit_gradient, void* box_gradient,
                                     int threads) {
    if (is_double) {
        detr_fast::backward(elements, layers, static_cast<const double*>(upstream), *saved,
                            static_cast<double*>(logit_gradient), static_cast<double*>(box_gradient), threads);
    } else {
        detr_fast::backward(elements, layers, static_cast<const float*>(upstream), *saved,
                            static_cast<float*>(logit_gradient), static_cast<float*>(box_gradient), threads);
    }
}
