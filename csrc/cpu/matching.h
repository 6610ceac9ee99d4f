// Cost and assignment in one pass on the CPU. See detr_fast/ops/matching/api.py for what it computes.

#pragma once

#include <cstdint>

#include "matching_cost.h"

#if defined(__cplusplus)
extern "C" {
#endif

// Writes query_of_target [L, N] (-1 where there is none) and nonfinite [L, B] (see cost_tile.h). Labels must be in
// range. Throws std::bad_alloc.
void detr_fast_matching_cpu(const struct detr_fast_matching_inputs* inputs,
                            const struct detr_fast_cost_weights* weights, int64_t* query_of_target, int64_t* nonfinite,
                            int threads);

#if defined(__cplusplus)
}
#endif
