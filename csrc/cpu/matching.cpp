#include "matching.h"

#include <algorithm>
#include <type_traits>

#include "../core/lsap.h"
#include "cost_tile.h"
#include "image_layers.h"
#include "match_image.h"
#include "softmax_rows.h"
#include "solver.h"

namespace detr_fast {
namespace {

constexpr size_t alignment = 64;

size_t aligned(size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
}

// The tile [T, Q] lies as the solver wants it where targets are fewer than queries. Else queries are its rows.
template <typename Real>
void transpose(const Real* tile, int64_t rows, int64_t columns, Real* transposed) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) transposed[j * rows + i] = tile[i * columns + j];
    }
}

template <typename Real>
int64_t match(const ImageLayer<Real>& image, const detr_fast_cost_weights& weights, const SoftmaxRows<Real>& softmax,
              int64_t* query_of_target) {
    if (image.targets == 0) return 0;
    static thread_local Scratch memory;
    const int64_t targets = image.targets;
    const int64_t queries = image.queries;
    const bool rows_are_targets = targets < queries;
    const int64_t rows = std::min(targets, queries);
    const int64_t columns = std::max(targets, queries);
    const size_t state = aligned(solver_memory(sizeof(Real) == sizeof(double), rows, columns));
    const size_t scratch = aligned(static_cast<size_t>(cost_tile_scratch(queries, targets)) * sizeof(Real));
    const size_t tile_bytes = aligned(static_cast<size_t>(targets * queries) * sizeof(Real));
    unsigned char* at = memory.reserve(state + scratch + tile_bytes * (rows_are_targets ? 1 : 2));
    auto* tile = reinterpret_cast<Real*>(at + state + scratch);
    const int64_t unusable = fill_cost_tile(image, weights, softmax, tile, reinterpret_cast<Real*>(at + state));

    CostMatrix<Real> cost{tile, columns, static_cast<int32_t>(rows), static_cast<int32_t>(columns)};
    if (!rows_are_targets) {
        auto* transposed = reinterpret_cast<Real*>(at + state + scratch + tile_bytes);
        transpose(tile, targets, queries, transposed);
        cost.entries = transposed;
    }
    solve(cost, rows_are_targets, at, query_of_target);  // every cost is finite, so that there is a solution
    memory.release_if_large();
    return unusable;
}

}  // namespace

int64_t match_image(const ImageLayer<float>& image, const detr_fast_cost_weights& weights,
                    const SoftmaxRows<float>& softmax, int64_t* query_of_target) {
    return match(image, weights, softmax, query_of_target);
}

int64_t match_image(const ImageLayer<double>& image, const detr_fast_cost_weights& weights,
                    const SoftmaxRows<double>& softmax, int64_t* query_of_target) {
    return match(image, weights, softmax, query_of_target);
}

}  // namespace detr_fast

void detr_fast_matching_cpu(const detr_fast_matching_inputs* inputs, const detr_fast_cost_weights* weights,
                            int64_t* query_of_target, int64_t* nonfinite, int threads) {
    detr_fast::for_each_image_layer(*inputs, threads, [&](const auto& image, int64_t problem, int64_t first_target) {
        using Real = std::decay_t<decltype(*image.logits)>;
        const auto softmax = detr_fast::SoftmaxRows<Real>::of_thread(image.queries, nullptr);
        if (!weights->focal && image.targets > 0) fill_softmax_rows(image, softmax);
        nonfinite[problem] = match_image(image, *weights, softmax, query_of_target + first_target);
    });
}
