// The weights of 3x3 kernels at the positions that Winograd's algorithm multiplies at: four times as many numbers as
// the weights themselves, which are therefore made when they are needed, from panels as gemm_tile.h describes them.

#pragma once

#include "gemm_tile.h"
#include "winograd_lines.h"

namespace detr_fast {
namespace winograd {

// Of one row of positions and one panel: position `column` of the row goes to `to` + column * position_step,
// [channels, 64]. `panel` is [9, channels, 64].
template <int Bytes, int row>
DETR_FAST_INLINE void transform_weights(const float* panel, int64_t channels, float* to, int64_t position_step) {
    using Floats = typename Registers<Bytes>::Floats;
    const int64_t tap_step = channels * panel_columns;
    for (int64_t i = 0; i < tap_step; i += Registers<Bytes>::width) {
        Floats line[3];
        unrolled<3>([&](auto column) DETR_FAST_LAMBDA {
            const auto weight = [&](int tap) DETR_FAST_LAMBDA {
                return load_as<Floats>(panel + (3 * tap + column) * tap_step + i);
            };
            line[column] = weight_at<row>(weight);
        });
        unrolled<inputs>([&](auto column) DETR_FAST_LAMBDA {
            constexpr float scale = static_cast<float>(weight_scale[row] * weight_scale[decltype(column)::value]);
            const auto along = [&](int tap) DETR_FAST_LAMBDA { return line[tap]; };
            store_as(to + column * position_step + i, weight_at<decltype(column)::value>(along) * scale);
        });
    }
}

}  // namespace winograd
}  // namespace detr_fast
