// Residual, dropout, layer norm and the position that is added to it, on the CPU.
// See detr_fast/ops/add_layer_norm/api.py for what it computes.

#pragma once

#include <cstdint>

#include "rows.h"

#if defined(__cplusplus)
extern "C" {
#endif

struct detr_fast_add_layer_norm {
    int64_t rows;     // N
    int64_t columns;  // D
    struct detr_fast_rows x, residual;
    const void* weight;   // [D], contiguous, of the dtype that is computed in: float32, or float64 if `is_double`
    const int64_t* seed;  // of the dropout, or null
    int64_t threshold;    // a number of 16 bits below it drops an element
    double scale;         // of the elements that are kept
    bool is_double;
};

struct detr_fast_add_layer_norm_outputs {
    const void* bias;  // as weight
    double eps;
    struct detr_fast_rows pos;  // row i takes row i % pos_rows
    int64_t pos_rows;           // 0: there is no pos, and y_pos is null
    void *y, *y_pos;            // [N, D], contiguous
    int32_t y_dtype;
    void *mean, *rstd;  // [N] as weight; or null, both
};

struct detr_fast_add_layer_norm_gradients {
    struct detr_fast_rows y, y_pos;  // incoming; address null where there is none
    const void *mean, *rstd;
    void *x, *residual;   // [N, D], contiguous, of the dtypes of x and residual; x null where it equals residual's
    void *weight, *bias;  // [D] as weight
};

// Both throw std::bad_alloc. The results do not depend on the number of threads.
void detr_fast_add_layer_norm_cpu(const struct detr_fast_add_layer_norm* in,
                                  const struct detr_fast_add_layer_norm_outputs* out, int threads);
void detr_fast_add_layer_norm_backward_cpu(const struct detr_fast_add_layer_norm* in,
                                           const struct detr_fast_add_layer_norm_gradients* gradients, int threads);

#if defined(__cplusplus)
}
#endif
