// Convolution for inference on the CPU. See detr_fast/ops/conv/api.py for what it computes.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// Maps are contiguous [B, height, width, channels]; those of the result have out_height x out_width pixels of
// out_channels. Padding, stride and dilation are the same in both directions.
struct detr_fast_conv {
    int64_t batch, height, width, channels;
    int64_t out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride, padding, dilation;
};

// Floats that the packed weight takes.
int64_t detr_fast_conv_packed_floats(const struct detr_fast_conv* shape);

// weight: [out_channels, channels, kernel_height, kernel_width], contiguous; scale: a factor of each out channel or
// null. With `adjoint` it is the weight of a convolution of stride 1 whose gradient this shape's convolution takes
// back: its out channels are this one's channels (scale has as many numbers), and its taps lie the other way round.
struct detr_fast_conv_weight {
    const float* weight;
    const float* scale;
    bool adjoint;
};

void detr_fast_conv_pack(const struct detr_fast_conv* shape, const struct detr_fast_conv_weight* weight, float* packed,
                         int threads);

// out = x * weight + bias + residual, the higher of that and 0 with `relu`, and 0 where gate <= 0. bias has
// out_channels numbers; bias, residual and gate may be null, and residual may be out. Throws std::bad_alloc.
void detr_fast_conv_cpu(const struct detr_fast_conv* shape, const float* x, const float* packed, const float* bias,
                        const float* residual, const float* gate, bool relu, float* out, int threads);

#if defined(__cplusplus)
}
#endif
