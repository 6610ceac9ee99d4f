#include "winograd.h"

#include <algorithm>
#include <numeric>

#include "solver.h"
#include "thread_pool.h"
#include "widths.h"
#include "winograd_block.h"
#include "winograd_patches.h"
#include "winograd_weights.h"

namespace detr_fast {
namespace {

using namespace winograd;

// ---- Few channels: weights are transformed once, and a thread takes some patches from their inputs to their outputs.

// Patches that a thread takes at once: 28 to 112 of 64 channels are equally fast.
constexpr int64_t most_patches = 48;

// Numbers of one position in the patches of a block. The line behind them keeps the positions from falling into the
// same sets of the cache.
int64_t position_floats(const detr_fast_conv& shape, int64_t patches) {
    return patches * padded(std::max(shape.channels, shape.out_channels)) + 16;
}

// As many blocks for each thread, all of the same size but for one patch.
int64_t blocks_of(int64_t patches, int64_t threads) {
    const int64_t wanted = (patches + most_patches - 1) / most_patches;
    return std::min(patches, (wanted + threads - 1) / threads * threads);
}

// The memory holds 37 times position_floats: products of a position lie where the transformed inputs of the position
// before did, so that both take little more than one.
struct BlockTask {
    const Layer& layer;
    int64_t first, end;
    const float* weights;
    float* products;

    template <int Bytes>
    bool run() const {
        const PatchTransforms<Bytes> transforms(layer);
        const int64_t channels = layer.shape.channels, out_channels = layer.shape.out_channels;
        const int64_t step = position_floats(layer.shape, end - first);
        float* const transformed = products + step;
        for (int64_t i = first; i < end; ++i)
            transforms.inputs_of(i, transformed + (i - first) * padded(channels), step);
        for (int64_t position = 0; position < positions; ++position) {
            multiply_position<Bytes>(layer.shape, end - first, transformed + position * step,
                                     weights + position * packed_floats(channels, out_channels),
                                     products + position * step);
        }
        for (int64_t i = first; i < end; ++i)
            transforms.outputs_of(i, products + (i - first) * padded(out_channels), step, 0, out_channels);
        return true;
    }
};

void run_by_patches(const Layer& layer, int threads) {
    static thread_local Scratch of_weights;
    float* const weights = reserve_floats(of_weights, weights_floats(layer.shape));
    transform_all_weights(layer.shape, layer.packed, weights, threads);
    const int64_t patches = Patches(layer.shape).count, blocks = blocks_of(patches, threads);
    parallel_for(blocks, threads, [&](int64_t block) {
        static thread_local Scratch scratch;
        const int64_t first = block * patches / blocks, end = (block + 1) * patches / blocks;
        float* const memory = reserve_floats(scratch, (positions + 1) * position_floats(layer.shape, end - first));
        with_widest_vectors(BlockTask{layer, first, end, weights, memory});
    });
}

// ---- Many channels: transformed inputs are shared, and a thread takes a panel from its weights to its outputs, so
// that transformed weights never leave its cache.

// Transformed inputs of a group of patches, which every panel meets: 222 patches of 256 channels, 111 of 512.
constexpr size_t group_bytes = size_t{8} << 20;

struct Group {
    int64_t first, count;  // patches
    int64_t step;          // from one position's transformed inputs to the next one's
    float* transformed;    // [36, count, padded channels]
};

struct InputsTask {
    const Layer& layer;
    const Group& group;
    int64_t first, end;  // within the group

    template <int Bytes>
    bool run() const {
        const PatchTransforms<Bytes> transforms(layer);
        for (int64_t i = first; i < end; ++i)
            transforms.inputs_of(group.first + i, group.transformed + i * padded(layer.shape.channels), group.step);
        return true;
    }
};

struct PanelTask {
    const Layer& layer;
    const Group& group;
    int64_t panel, first, end;  // patches within the group
    float* memory;

    static int64_t weight_step(const Layer& layer) { return layer.shape.channels * panel_columns + 80; }
    static int64_t weights_floats(const Layer& layer) { return inputs * weight_step(layer); }
    static int64_t product_step(int64_t patches) { return patches * panel_columns + 16; }
    static int64_t memory_floats(const Layer& layer, int64_t patches) {
        return weights_floats(layer) + positions * product_step(patches);
    }

    template <int Bytes>
    bool run() const {
        const int64_t channels = layer.shape.channels, step = product_step(end - first);
        const float* const from = layer.packed + panel * 9 * channels * panel_columns;
        float* const products = memory + weights_floats(layer);
        unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA {
            transform_weights<Bytes, row>(from, channels, memory, weight_step(layer));
            multiply<Bytes>(row * inputs, products + row * inputs * step, step);
        });
        const PatchTransforms<Bytes> transforms(layer);
        const int64_t k = panel * panel_columns, last = std::min(k + panel_columns, layer.shape.out_channels);
        for (int64_t i = first; i < end; ++i) {
            const float* const of_patch = products + (i - first) * panel_columns;
            // The second cache may not hold all products.
            for (int64_t position = 0; position < positions; ++position) {
                for (int64_t line = 0; line < panel_columns; line += 16)
                    prefetch(of_patch + position * step + 2 * panel_columns + line);
            }
            transforms.outputs_of(group.first + i, of_patch, step, k, last);
        }
        return true;
    }

    // The six positions from `position` on.
    template <int Bytes>
    DETR_FAST_INLINE void multiply(int64_t position, float* to, int64_t step) const {
        const int64_t channels = layer.shape.channels, left_step = padded(channels);
        const int64_t count = end - first, tiles = (count + Tile<Bytes>::rows - 1) / Tile<Bytes>::rows;
        const float* right = memory;
        for (int64_t i = 0; i < inputs; ++i, right += weight_step(layer), to += step) {
            const float* const left = group.transformed + (position + i) * group.step + first * left_step;
            for (int64_t column = 0; column < panel_columns; column += Tile<Bytes>::columns) {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t row = tile * count / tiles, next_row = (tile + 1) * count / tiles;
                    const float* next = left + next_row * left_step;
                    const auto fetch = [&]() DETR_FAST_LAMBDA {
                        prefetch(next);
                        next += Tile<Bytes>::rows;
                    };
                    multiply_rows<Bytes>(next_row - row, left + row * left_step, left_step, channels, right + column,
                                         to + row * panel_columns + column, panel_columns, fetch);
                }
            }
        }
    }
};

void run_group(const Layer& layer, const Group& group, int threads) {
    const int64_t parts = std::min<int64_t>(group.count, 4 * threads);
    parallel_for(parts, threads, [&](int64_t part) {
        const int64_t first = part * group.count / parts, end = (part + 1) * group.count / parts;
        with_widest_vectors(InputsTask{layer, group, first, end});
    });
    // Threads that do not share the panels evenly share each one's patches as well.
    const int64_t panels = panels_of(layer.shape.out_channels);
    const int64_t shares = std::min(group.count, threads / std::gcd<int64_t, int64_t>(panels, threads));
    parallel_for(panels * shares, threads, [&](int64_t i) {
        static thread_local Scratch scratch;
        const int64_t panel = i / shares, share = i % shares;
        const int64_t first = share * group.count / shares, end = (share + 1) * group.count / shares;
        float* const memory = reserve_floats(scratch, PanelTask::memory_floats(layer, end - first));
        with_widest_vectors(PanelTask{layer, group, panel, first, end, memory});
        scratch.release_if_large();
    });
}

void run_by_panels(const Layer& layer, int threads) {
    static thread_local Scratch scratch(group_bytes + (size_t{1} << 20));
    const int64_t patches = Patches(layer.shape).count, of_patch = positions * padded(layer.shape.channels);
    const int64_t most = std::max<int64_t>(1, group_bytes / sizeof(float) / of_patch);
    const int64_t groups = (patches + most - 1) / most;
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t first = i * patches / groups, count = (i + 1) * patches / groups - first;
        const int64_t step = count * padded(layer.shape.channels) + 16;
        run_group(layer, {first, count, step, reserve_floats(scratch, positions * step)}, threads);
    }
    scratch.release_if_large();
}

}  // namespace
}  // namespace detr_fast

bool detr_fast_winograd_is_faster(const detr_fast_conv* shape) {
    const bool fits = shape->kernel_height == 3 && shape->kernel_width == 3 && shape->stride == 1;
    if (!fits || shape->padding != shape->dilation) return false;
    // On two cores of AVX-512 gemm takes 2.1 to 2.9 times as long as winograd on layers of a ResNet-50 at 800x1066
    // (2.9 to 3.5 with AVX2), 1.7 with 8 channels and 2.7 with 16 at 100x100, 1.8 with 512 channels at 15x20, and 1.1
    // with 256 and 512 at 8x8. Below that winograd transforms the weight for little.
    const int64_t pixels = shape->batch * shape->out_height * shape->out_width;
    return std::min(shape->channels, shape->out_channels) >= 8 && pixels >= 256;
}

void detr_fast_winograd_cpu(const detr_fast_conv* shape, const float* x, const float* packed, const float* bias,
                            const float* residual, const float* gate, bool relu, float* out, int threads) {
    using namespace detr_fast;
    const Layer layer{*shape, x, packed, bias, residual, gate, relu, out};
    has_few_channels(*shape) ? run_by_patches(layer, std::max(threads, 1)) : run_by_panels(layer, std::max(threads, 1));
}
