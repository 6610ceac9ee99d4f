// The batched assignment on a CUDA device. See detr_fast/ops/assignment/api.py for what it computes.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// The bytes of device memory that the launch needs as workspace; 0 where all problems fit in shared memory.
// The sizes are as for the launch. A CUDA error is returned negated.
int64_t detr_fast_assignment_cuda_workspace(bool is_double, const int64_t sizes[3], const int64_t strides[3],
                                            const int64_t* num_targets, int device);

// As detr_fast_assignment_cpu by shortest paths, except that cost, query_of_target, outcome, dual_gap (which may be
// null) and workspace are device memory; num_targets is host memory and is read before the call returns. Neither
// allocates nor waits; works in stream order, and can be captured in a graph (the counts are then part of it). Returns
// a cudaError_t.
int detr_fast_assignment_cuda(const void* cost, bool is_double, const int64_t sizes[3], const int64_t strides[3],
                              const int64_t* num_targets, int64_t* query_of_target, int32_t* outcome, double* dual_gap,
                              void* workspace, int device, void* stream);

const char* detr_fast_cuda_error(int error);

#if defined(__cplusplus)
}
#endif
