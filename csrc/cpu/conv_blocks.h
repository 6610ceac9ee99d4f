// Residual blocks of convolutions, one after the other, for inference on the CPU. See
// detr_fast/ops/conv_blocks/api.py for what they compute.

#pragma once

#include "conv.h"

#if defined(__cplusplus)
extern "C" {
#endif

// A convolution for maps of any size. Of `packed` and `bias` see conv.h.
struct detr_fast_packed_conv {
    int64_t channels, out_channels, kernel_height, kernel_width, stride, padding, dilation;
    const float* packed;
    const float* bias;
};

// Convolutions one behind the other, two at least, and that of the shortcut: null where it is the identity.
struct detr_fast_conv_block {
    const struct detr_fast_packed_conv* convs;
    int64_t count;
    const struct detr_fast_packed_conv* shortcut;
};

// Only the first block has a shortcut that is no identity.
struct detr_fast_conv_blocks {
    const struct detr_fast_conv_block* blocks;
    int64_t count;
};

struct detr_fast_map {
    int64_t batch, height, width;
};

// Floats that lie between the convolutions of a block at the same time.
int64_t detr_fast_conv_blocks_floats(const struct detr_fast_conv_blocks* blocks, const struct detr_fast_map* of_x);

// x, memory (of as many floats) and out do not overlap. Throws std::bad_alloc.
void detr_fast_conv_blocks_cpu(const struct detr_fast_conv_blocks* blocks, const struct detr_fast_map* of_x,
                               const float* x, float* memory, float* out, int threads);

#if defined(__cplusplus)
}
#endif
