// The batched assignment on the CPU. See detr_fast/ops/assignment/api.py for what it computes.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// cost is [P, Q, T] with strides in elements, float64 where is_double, else float32; num_targets has P counts.
// Writes query_of_target [P, T] (contiguous; -1 where there is none), outcome [P] (core/lsap.h, Outcome) and, unless it
// is null, dual_gap [P] (core/dual_gap.h; +inf where there is no matching).
// Throws std::bad_alloc.
void detr_fast_assignment_cpu(const void* cost, bool is_double, const int64_t sizes[3], const int64_t strides[3],
                              const int64_t* num_targets, bool by_auction, int64_t* query_of_target, int32_t* outcome,
                              double* dual_gap, int threads);

// How many threads are of use for that many costs in all problems together.
int detr_fast_assignment_cpu_threads(int64_t costs);

#if defined(__cplusplus)
}
#endif
