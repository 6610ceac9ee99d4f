// A bottleneck block depth first: 1x1, 3x3 by Winograd's algorithm, 1x1, residual and ReLU for a few pixels at a time,
// so that the maps between stay in the second cache, and what is read for the first convolution is still there when the
// last one adds to it.
//
// Layer after layer, with 2 MB a core on two cores, the three blocks of a ResNet-50's first stage take 1.11 times as
// long at 800x1066 and 1.10 at 480x640, three of the second stage 1.02 to 1.06 and 1.00. (1x1 convolutions alone would
// take 0.77 to 0.94 of their time if they found their maps in the second cache.) Later stages have too many channels:
// their transformed weights are larger than the cache.

#pragma once

#include "conv_blocks.h"

namespace detr_fast {

// Whether the block, for maps of this size, is such that run_bottleneck can run it and takes less time than one
// convolution after the other.
bool is_bottleneck(const detr_fast_conv_block& block, const detr_fast_map& map);

// The bits are those of one convolution after the other. x may be out where there is no shortcut. Throws
// std::bad_alloc.
void run_bottleneck(const detr_fast_conv_block& block, const detr_fast_map& map, const float* x, float* out,
                    int threads);

}  // namespace detr_fast
