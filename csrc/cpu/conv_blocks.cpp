#include "conv_blocks.h"

#include <algorithm>

#include "bottleneck.h"
#include "winograd.h"

namespace detr_fast {
namespace {

// The convolution's shape for a map.
detr_fast_conv shape_of(const detr_fast_packed_conv& conv, const detr_fast_map& map) {
    const auto along = [&](int64_t pixels, int64_t kernel) {
        return (pixels + 2 * conv.padding - conv.dilation * (kernel - 1) - 1) / conv.stride + 1;
    };
    const int64_t rows = along(map.height, conv.kernel_height), columns = along(map.width, conv.kernel_width);
    return {map.batch,         map.height,         map.width,         conv.channels, rows,         columns,
            conv.out_channels, conv.kernel_height, conv.kernel_width, conv.stride,   conv.padding, conv.dilation};
}

detr_fast_map map_after(const detr_fast_conv& shape) {
    return {shape.batch, shape.out_height, shape.out_width};
}

// In whole lines of the cache.
int64_t floats_after(const detr_fast_conv& shape) {
    return (shape.batch * shape.out_height * shape.out_width * shape.out_channels + 15) / 16 * 16;
}

// A convolution reads the map of one place and writes to the other's.
struct Places {
    int64_t floats[2] = {0, 0};

    Places(const detr_fast_conv_block& block, detr_fast_map map) {
        if (is_bottleneck(block, map)) return;
        for (int64_t i = 0; i + 1 < block.count; ++i) {
            const detr_fast_conv shape = shape_of(block.convs[i], map);
            floats[i % 2] = std::max(floats[i % 2], floats_after(shape));
            map = map_after(shape);
        }
    }
};

detr_fast_map map_after(const detr_fast_conv_block& block, detr_fast_map map) {
    for (int64_t i = 0; i < block.count; ++i) map = map_after(shape_of(block.convs[i], map));
    return map;
}

void run(const detr_fast_packed_conv& conv, const detr_fast_map& map, const float* x, const float* residual, bool relu,
         float* out, int threads) {
    const detr_fast_conv shape = shape_of(conv, map);
    const auto algorithm = detr_fast_winograd_is_faster(&shape) ? detr_fast_winograd_cpu : detr_fast_conv_cpu;
    algorithm(&shape, x, conv.packed, conv.bias, residual, nullptr, relu, out, threads);
}

// x may be out where there is no shortcut: its last convolution reads and writes a pixel at once.
void run(const detr_fast_conv_block& block, detr_fast_map map, const float* x, float* memory, float* out, int threads) {
    if (is_bottleneck(block, map)) return run_bottleneck(block, map, x, out, threads);
    const Places places(block, map);
    const detr_fast_map of_x = map;
    const float* from = x;
    for (int64_t i = 0; i + 1 < block.count; ++i) {
        float* const to = memory + (i % 2 == 0 ? 0 : places.floats[0]);
        run(block.convs[i], map, from, nullptr, true, to, threads);
        map = map_after(shape_of(block.convs[i], map));
        from = to;
    }
    if (block.shortcut != nullptr) run(*block.shortcut, of_x, x, nullptr, false, out, threads);
    run(block.convs[block.count - 1], map, from, block.shortcut == nullptr ? x : out, true, out, threads);
}

}  // namespace
}  // namespace detr_fast

int64_t detr_fast_conv_blocks_floats(const detr_fast_conv_blocks* blocks, const detr_fast_map* of_x) {
    using namespace detr_fast;
    int64_t most = 0;
    detr_fast_map map = *of_x;
    for (int64_t i = 0; i < blocks->count; ++i) {
        const Places places(blocks->blocks[i], map);
        most = std::max(most, places.floats[0] + places.floats[1]);
        map = map_after(blocks->blocks[i], map);
    }
    return most;
}

void detr_fast_conv_blocks_cpu(const detr_fast_conv_blocks* blocks, const detr_fast_map* of_x, const float* x,
                               float* memory, float* out, int threads) {
    using namespace detr_fast;
    detr_fast_map map = *of_x;
    for (int64_t i = 0; i < blocks->count; ++i) {
        const detr_fast_conv_block& block = blocks->blocks[i];
        run(block, map, i == 0 ? x : out, memory, out, threads);
        map = map_after(block, map);
    }
}
