#include "mask_threshold.h"

#include <algorithm>

#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

// Two rows become one, which is then read at the columns: the upsampled masks are never stored.
DETR_FAST_CLONES void fill_row(const float* __restrict__ row, const float* __restrict__ next, int64_t width,
                               float share, const detr_fast_places& columns, float bound, float* __restrict__ blended,
                               uint8_t* __restrict__ above) {
    const int32_t* __restrict__ at = columns.first;
    const float* __restrict__ part = columns.share;
    for (int64_t x = 0; x < width; ++x) blended[x] = row[x] * (1.0f - share) + next[x] * share;
    blended[width] = blended[width - 1];
    for (int64_t x = 0; x < columns.count; ++x) {
        above[x] = blended[at[x]] * (1.0f - part[x]) + blended[at[x] + 1] * part[x] > bound;
    }
}

}  // namespace
}  // namespace detr_fast

void detr_fast_mask_threshold_cpu(const float* masks, const int64_t sizes[3], const detr_fast_places* rows,
                                  const detr_fast_places* columns, float bound, uint8_t* above, int threads) {
    const int64_t height = sizes[1], width = sizes[2];
    const auto bytes = static_cast<size_t>(width + 1) * sizeof(float);
    detr_fast::parallel_for(sizes[0], threads, [&](int64_t k) {
        static thread_local detr_fast::Scratch scratch;
        auto* blended = reinterpret_cast<float*>(scratch.reserve(bytes));
        const float* mask = masks + k * height * width;
        for (int64_t y = 0; y < rows->count; ++y) {
            const int64_t first = rows->first[y];
            detr_fast::fill_row(mask + first * width, mask + std::min(first + 1, height - 1) * width, width,
                                rows->share[y], *columns, bound, blended,
                                above + (k * rows->count + y) * columns->count);
        }
    });
}
