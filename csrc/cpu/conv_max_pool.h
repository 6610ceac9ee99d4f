// A convolution, ReLU and max-pooling in one pass, on the CPU. See detr_fast/ops/conv_max_pool/api.py for what it
// computes.

#pragma once

#include "conv.h"

#if defined(__cplusplus)
extern "C" {
#endif

// The shape's out_height and out_width are the convolution's; its dilation is 1. strides are x's, of image, channel,
// row and column. Of `packed` and `bias` see conv.h. out is [B, (out_height + 1) / 2, (out_width + 1) / 2,
// out_channels]. Throws std::bad_alloc.
void detr_fast_conv_max_pool_cpu(const struct detr_fast_conv* shape, const float* x, const int64_t strides[4],
                                 const float* packed, const float* bias, float* out, int threads);

#if defined(__cplusplus)
}
#endif
