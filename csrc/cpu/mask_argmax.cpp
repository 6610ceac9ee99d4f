#include "mask_argmax.h"

#include <algorithm>
#include <limits>

#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

// Two rows become one, which is then read at the columns: the upsampled masks
// are never stored.
DETR_FAST_CLONES void fill_row(const float* masks, const int64_t sizes[3], const detr_fast_places& columns,
                               int64_t first, int64_t next, float share, float* memory, int64_t* index) {
    const int64_t width = sizes[2];
    float* __restrict__ blended = memory;
    float* __restrict__ best = blended + width + 1;
    auto* __restrict__ best_mask = reinterpret_cast<int32_t*>(best + columns.count);
    const int32_t* __restrict__ at = columns.first;
    const float* __restrict__ part = columns.share;
    std::fill_n(best, columns.count, -std::numeric_limits<float>::infinity());
    std::fill_n(best_mask, columns.count, 0);
    for (int64_t k = 0; k < sizes[0]; ++k) {
        const float* __restrict__ above = masks + (k * sizes[1] + first) * width;
        const float* __restrict__ below = masks + (k * sizes[1] + next) * width;
        for (int64_t x = 0; x < width; ++x) blended[x] = above[x] * (1.0f - share) + below[x] * share;
        blended[width] = blended[width - 1];
        const auto mask = static_cast<int32_t>(k);
        for (int64_t x = 0; x < columns.count; ++x) {
            const float value = blended[at[x]] * (1.0f - part[x]) + blended[at[x] + 1] * part[x];
            best_mask[x] = value > best[x] ? mask : best_mask[x];
            best[x] = value > best[x] ? value : best[x];
        }
    }
    for (int64_t x = 0; x < columns.count; ++x) index[x] = best_mask[x];
}

}  // namespace
}  // namespace detr_fast

void detr_fast_mask_argmax_cpu(const float* masks, const int64_t sizes[3], const detr_fast_places* rows,
                               const detr_fast_places* columns, int64_t* index, int threads) {
    constexpr int64_t block = 16;  // rows: a task should be long beside the
                                   // hundreds of nanoseconds of handing it out
    const auto bytes = static_cast<size_t>(sizes[2] + 1 + 2 * columns->count) * sizeof(float);
    detr_fast::parallel_for((rows->count + block - 1) / block, threads, [&](int64_t task) {
        static thread_local detr_fast::Scratch scratch;
        auto* memory = reinterpret_cast<float*>(scratch.reserve(bytes));
        for (int64_t y = task * block; y < std::min((task + 1) * block, rows->count); ++y) {
            const int64_t first = rows->first[y];
            const int64_t next = std::min(first + 1, sizes[1] - 1);
            detr_fast::fill_row(masks, sizes, *columns, first, next, rows->share[y], memory,
                                index + y * columns->count);
        }
    });
}
