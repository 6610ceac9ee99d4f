// Convolution in 8-bit integers on the CPU. See detr_fast/ops/conv_int8/api.py for what it computes.

#pragma once

#include <cstdint>

#include "conv.h"

#if defined(__cplusplus)
extern "C" {
#endif

// How sums become numbers of the result: factor * sum + bias + residual_factor * residual.
struct detr_fast_int8_result {
    const float* factor;  // of whole panels of 64 out channels, as bias
    const float* bias;
    const uint8_t* residual;  // of the result's shape, or null; may be `out`
    float residual_factor;
    bool is_float;  // float, else rounded to the nearest of 0 to 255
    bool relu;
    void* out;
};

// x: maps of bytes; packed: the weight in the panels of int8_tile.h, taps one after the other, in each its channels.
// instructions: the fastest of enum Int8Instructions that may be used. Throws std::bad_alloc.
void detr_fast_conv_int8_cpu(const struct detr_fast_conv* shape, const uint8_t* x, const int8_t* packed,
                             const struct detr_fast_int8_result* result, int instructions, int threads);

// The fastest enum Int8Instructions that this processor has.
int detr_fast_int8_instructions();

// to[i] = the nearest of 0 to 255 to from[i] * factor.
void detr_fast_to_bytes_cpu(const float* from, int64_t count, float factor, uint8_t* to, int threads);

#if defined(__cplusplus)
}
#endif
