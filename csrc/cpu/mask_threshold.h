// Where upsampled masks are above a bound, on the CPU. See detr_fast/ops/mask_threshold/api.py for what it computes.

#pragma once

#include <cstdint>

#include "mask_argmax.h"

#if defined(__cplusplus)
extern "C" {
#endif

// masks is [K, h, w], contiguous, with sizes {K, h, w}. Writes above [K, rows, columns], contiguous, 0 or 1.
// Throws std::bad_alloc.
void detr_fast_mask_threshold_cpu(const float* masks, const int64_t sizes[3], const struct detr_fast_places* rows,
                                  const struct detr_fast_places* columns, float bound, uint8_t* above, int threads);

#if defined(__cplusplus)
}
#endif
