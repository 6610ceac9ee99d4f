// The matching cost on the CPU. See detr_fast/ops/matching_cost/api.py for what it computes.

#pragma once

#include <cstdint>

#include "../core/matching_inputs.h"

#if defined(__cplusplus)
extern "C" {
#endif

// Writes cost [L, N, Q] and nonfinite [L, B] (see cost_tile.h). Labels must be in range. Throws std::bad_alloc.
void detr_fast_matching_cost_cpu(const struct detr_fast_matching_inputs* inputs,
                                 const struct detr_fast_cost_weights* weights, void* cost, int64_t* nonfinite,
                                 int threads);

#if defined(__cplusplus)
}
#endif
