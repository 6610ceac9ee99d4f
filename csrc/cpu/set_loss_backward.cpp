#include <algorithm>

#include "set_loss.h"
#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

// Numbers that one thread scales in about 20 microseconds, which waking another takes.
constexpr int64_t chunk = 1 << 16;

template <typename Real>
void scale(const Real* __restrict__ from, Real factor, int64_t count, Real* __restrict__ to) {
    for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
}

DETR_FAST_CLONES void scaled(const float* from, float factor, int64_t count, float* to) {
    scale(from, factor, count, to);
}

DETR_FAST_CLONES void scaled(const double* from, double factor, int64_t count, double* to) {
    scale(from, factor, count, to);
}

template <typename Real>
void backward(const int64_t* elements, int64_t layers, const Real* upstream, const detr_fast_set_losses& saved,
              Real* logit_gradient, Real* box_gradient, int threads) {
    const auto* l1 = static_cast<const Real*>(saved.l1_slope);
    const auto* giou = static_cast<const Real*>(saved.giou_slope);
    for (int64_t l = 0; l < layers; ++l) {
        for (int64_t i = l * elements[1]; i < (l + 1) * elements[1]; ++i) {
            box_gradient[i] = upstream[layers + l] * l1[i] + upstream[2 * layers + l] * giou[i];
        }
    }
    if (logit_gradient == nullptr) return;
    const int64_t chunks = (elements[0] + chunk - 1) / chunk;
    parallel_for(layers * chunks, static_cast<int>(std::min<int64_t>(threads, layers * chunks)), [&](int64_t task) {
        const int64_t layer = task / chunks;
        const int64_t first = task % chunks * chunk;
        const int64_t offset = layer * elements[0] + first;
        const int64_t count = std::min(chunk, elements[0] - first);
        scaled(static_cast<const Real*>(saved.logit_slope) + offset, upstream[layer], count, logit_gradient + offset);
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
