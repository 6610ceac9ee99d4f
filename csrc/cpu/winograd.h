// 3x3 convolutions of stride 1 with a quarter of the multiplications: Winograd's F(4x4, 3x3), for maps that keep their
// size (padding = dilation).
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, with other points of interpolation: see
// winograd_lines.h for them and for what they do to the error.

#pragma once

#include "conv.h"

#if defined(__cplusplus)
extern "C" {
#endif

// Whether a 3x3 convolution of stride 1 that keeps the map's size takes less time so than by detr_fast_conv_cpu; false
// for all others.
bool detr_fast_winograd_is_faster(const struct detr_fast_conv* shape);

// As detr_fast_conv_cpu, with the weight as detr_fast_conv_pack packs it. The bits of the result do not depend on the
// number of threads. A number that is not finite spoils every output of the 4x4 that it is an input of.
void detr_fast_winograd_cpu(const struct detr_fast_conv* shape, const float* x, const float* packed, const float* bias,
                            const float* residual, const float* gate, bool relu, float* out, int threads);

// The gradient of the weight [out_channels, channels, 3, 3], times a factor of each out channel where scale is not
// null, from a map and the gradient of the convolution's result: the transpose of the same algorithm, with a quarter of
// the multiplications. The bits of the result do not depend on the number of threads. Throws std::bad_alloc.
void detr_fast_winograd_weight_gradient_cpu(const struct detr_fast_conv* shape, const float* x, const float* grad,
                                            const float* scale, float* of_weight, int threads);

#if defined(__cplusplus)
}
#endif
