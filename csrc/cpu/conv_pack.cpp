#include <algorithm>
#include <vector>

#include "conv.h"
#include "conv_weight.h"
#include "gemm_tile.h"
#include "thread_pool.h"

int64_t detr_fast_conv_packed_floats(const detr_fast_conv* shape) {
    return detr_fast::packed_floats(shape->kernel_height * shape->kernel_width * shape->channels, shape->out_channels);
}

void detr_fast_conv_pack(const detr_fast_conv* shape, const detr_fast_conv_weight* weight, float* packed, int threads) {
    using namespace detr_fast;
    const int64_t taps = shape->kernel_height * shape->kernel_width, channels = shape->channels;
    const WeightBlock of(*shape);
    const int64_t blocks = of.blocks_of_panel();
    parallel_for(panels_of(shape->out_channels) * blocks, threads, [&](int64_t i) {
        const int64_t panel = i / blocks, block = i % blocks, first = of.first_channel(block);
        std::vector<float> rows(static_cast<size_t>(of.floats()));
        of.gather(*weight, panel, block, rows.data());
        // In the order in which the sums are formed: weight by weight of the kernel, all channels of each.
        const float* row = rows.data();
        for (int64_t c = first; c < of.end_channel(block); ++c) {
            for (int64_t t = 0; t < taps; ++t, row += panel_columns) {
                std::copy_n(row, panel_columns, packed + ((panel * taps + t) * channels + c) * panel_columns);
            }
        }
    });
}
