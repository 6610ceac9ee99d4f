// The highest of upsampled masks at each pixel, on the CPU. See
// detr_fast/ops/mask_argmax/api.py for what it computes.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// Where the rows (or columns) of the result lie among those of the masks: (1 -
// share) of `first` and `share` of the next, which is not read where share is
// 0.
struct detr_fast_places {
    int64_t count;
    const int32_t* first;
    const float* share;
};

// masks is [K, h, w], contiguous, with sizes {K, h, w}. Writes index [rows,
// columns], contiguous. Throws std::bad_alloc.
void detr_fast_mask_argmax_cpu(const float* masks, const int64_t sizes[3], const struct detr_fast_places* rows,
                               const struct detr_fast_places* columns, int64_t* index, int threads);

#if defined(__cplusplus)
}
#endif
