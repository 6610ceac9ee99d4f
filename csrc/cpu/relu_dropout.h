// ReLU and dropout in one pass on the CPU. See detr_fast/ops/relu_dropout/api.py for what it computes.

#pragma once

#include <cstdint>

#include "rows.h"

#if defined(__cplusplus)
extern "C" {
#endif

struct detr_fast_relu_dropout {
    int64_t rows;     // N
    int64_t columns;  // D
    struct detr_fast_rows x;
    const int64_t* seed;
    int64_t threshold;  // a number of 16 bits below it drops an element
    double scale;       // of the elements that are kept
};

// Writes y [N, D], contiguous, of the dtype of x, which it may be. Throws std::bad_alloc.
void detr_fast_relu_dropout_cpu(const struct detr_fast_relu_dropout* in, void* y, int threads);

// Writes grad_x [N, D] of x = the incoming gradient, given y: it flows where y is positive. Needs no seed.
void detr_fast_relu_dropout_backward_cpu(const struct detr_fast_relu_dropout* in, const struct detr_fast_rows* y,
                                         void* grad_x, int threads);

#if defined(__cplusplus)
}
#endif
