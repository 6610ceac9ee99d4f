#include "winograd.h"

#include <algorithm>
#include <vector>

#include "conv_weight.h"
#include "gemm_tile.h"
#include "solver.h"
#include "thread_pool.h"
#include "widths.h"
#include "winograd_lines.h"

namespace detr_fast {
namespace {

using namespace winograd;

struct Layer {
    const detr_fast_conv& shape;
    const float* x;
    const float* packed;
    const float* bias;
    const float* residual;
    const float* gate;
    bool relu;
    float* out;
};

// Patches are 4x4 outputs, and the 6x6 inputs around them, of one image. Where the convolution is dilated, their pixels
// are `dilation` apart.
struct Patch {
    int64_t image, top, left;  // of the first output
};

struct Patches {
    int64_t rows, columns, dilation, count;

    explicit Patches(const detr_fast_conv& shape)
        : rows(along(shape.height, shape.dilation)),
          columns(along(shape.width, shape.dilation)),
          dilation(shape.dilation) {
        count = shape.batch * dilation * dilation * rows * columns;
    }

    static int64_t along(int64_t pixels, int64_t dilation) {
        const int64_t apart = (pixels + dilation - 1) / dilation;
        return (apart + outputs - 1) / outputs;
    }

    Patch at(int64_t i) const {
        const int64_t column = i % columns, row = i / columns % rows, grid = i / (columns * rows);
        const int64_t top = grid / dilation % dilation, left = grid % dilation;
        return {grid / (dilation * dilation), top + row * outputs * dilation, left + column * outputs * dilation};
    }
};

// Patches that a thread takes at once: with 48 the transformed numbers of 256 channels stay in an L2 cache of 2 MB. Of
// 64 channels 28 to 112 are equally fast, of 512 (twice the cache) 32 are, because a block meets 38 MB of weights.
constexpr int64_t most_patches = 48;
constexpr int64_t block_bytes = int64_t{4} << 20;

int64_t padded(int64_t channels) {
    return panels_of(channels) * panel_columns;
}

// Numbers of one position in the patches of a block. The line behind them keeps the positions from falling into the
// same sets of the cache.
int64_t position_floats(const detr_fast_conv& shape, int64_t patches) {
    return patches * padded(std::max(shape.channels, shape.out_channels)) + 16;
}

int64_t patches_at_once(const detr_fast_conv& shape) {
    const int64_t fit = block_bytes / static_cast<int64_t>(sizeof(float)) / (positions + 1) / position_floats(shape, 1);
    return std::clamp<int64_t>(fit, 1, most_patches);
}

// As many for each thread, all of the same size but for one patch.
int64_t blocks_of(const detr_fast_conv& shape, int64_t patches, int64_t threads) {
    const int64_t each = patches_at_once(shape), wanted = (patches + each - 1) / each;
    return std::min(patches, (wanted + threads - 1) / threads * threads);
}

template <int Bytes>
DETR_FAST_INLINE typename Registers<Bytes>::Floats load_first(const float* from, int64_t count) {
    if (count >= Registers<Bytes>::width) return load_as<typename Registers<Bytes>::Floats>(from);
    float numbers[Registers<Bytes>::width] = {};
    for (int64_t i = 0; i < count; ++i) numbers[i] = from[i];
    return load_as<typename Registers<Bytes>::Floats>(numbers);
}

template <int Bytes>
DETR_FAST_INLINE void store_first(float* to, const typename Registers<Bytes>::Floats& x, int64_t count) {
    if (count >= Registers<Bytes>::width) return store_as(to, x);
    float numbers[Registers<Bytes>::width];
    store_as(numbers, x);
    for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
}

// call(count) with a constant, for count from 1 to `most`.
template <int most, typename Call>
DETR_FAST_INLINE void with_constant(int64_t count, const Call& call) {
    if (count == most) return call(std::integral_constant<int, most>{});
    if constexpr (most > 1) with_constant<most - 1>(count, call);
}

// Some patches from their inputs to their outputs. The memory holds 37 times position_floats: products of a position
// lie where the transformed inputs of the position before did, so that both take little more than one.
template <int Bytes>
class Block {
  public:
    using Floats = typename Registers<Bytes>::Floats;
    static constexpr int64_t width = Registers<Bytes>::width;

    DETR_FAST_INLINE Block(const Layer& layer, int64_t first, int64_t end, float* memory)
        : layer_(layer),
          shape_(layer.shape),
          patches_(layer.shape),
          first_(first),
          count_(end - first),
          tiles_((count_ + Tile<Bytes>::rows - 1) / Tile<Bytes>::rows),
          depth_step_(padded(shape_.channels)),
          product_step_(padded(shape_.out_channels)),
          position_step_(position_floats(shape_, count_)),
          products_(memory),
          transformed_(memory + position_step_) {}

    DETR_FAST_INLINE void run() const {
        for (int64_t i = 0; i < count_; ++i) transform_inputs(i);
        for (int64_t position = 0; position < positions; ++position) multiply(position);
        for (int64_t i = 0; i < count_; ++i) transform_products(i);
    }

  private:
    DETR_FAST_INLINE void transform_inputs(int64_t i) const {
        const Patch patch = patches_.at(first_ + i);
        const int64_t d = shape_.dilation, top = patch.top - d, left = patch.left - d, reach = (inputs - 1) * d;
        const int64_t column_step = d * shape_.channels, row_step = shape_.width * column_step;
        const float* corner = layer_.x + ((patch.image * shape_.height + top) * shape_.width + left) * shape_.channels;
        float* to = transformed_ + i * depth_step_;
        const bool inside = top >= 0 && left >= 0 && top + reach < shape_.height && left + reach < shape_.width;
        const int64_t whole = inside ? shape_.channels / width * width : 0;
        for (int64_t c = 0; c < whole; c += width) {
            transform_channels(to + c, [&](auto row, auto column) DETR_FAST_LAMBDA {
                return load_as<Floats>(corner + row * row_step + column * column_step + c);
            });
        }
        for (int64_t c = whole; c < shape_.channels; c += width) {
            transform_channels(to + c, [&](auto row, auto column) DETR_FAST_LAMBDA {
                if (!inside && !holds(top + row * d, left + column * d)) return Floats{};
                return load_first<Bytes>(corner + row * row_step + column * column_step + c, shape_.channels - c);
            });
        }
    }

    template <typename Pixel>
    DETR_FAST_INLINE void transform_channels(float* to, const Pixel& pixel) const {
        Floats rows[inputs][inputs];
        unrolled<inputs>([&](auto column) DETR_FAST_LAMBDA {
            Floats x[inputs], at[inputs];
            unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA { x[row] = pixel(row, column); });
            input_line(x, at);
            unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA { rows[row][column] = at[row]; });
        });
        unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA {
            Floats at[inputs];
            input_line(rows[row], at);
            unrolled<inputs>([&](auto column) DETR_FAST_LAMBDA {
                store_as(to + (row * inputs + column) * position_step_, at[column]);
            });
        });
    }

    DETR_FAST_INLINE void multiply(int64_t position) const {
        const float* panel = layer_.packed + position * packed_floats(shape_.channels, shape_.out_channels);
        for (int64_t k = 0; k < shape_.out_channels; k += panel_columns, panel += shape_.channels * panel_columns) {
            for (int64_t column = 0; column < panel_columns; column += Tile<Bytes>::columns) {
                for (int64_t tile = 0; tile < tiles_; ++tile) multiply(position, panel, k, column, tile);
            }
        }
    }

    DETR_FAST_INLINE void multiply(int64_t position, const float* panel, int64_t k, int64_t column,
                                   int64_t tile) const {
        const int64_t first = tile * count_ / tiles_, end = (tile + 1) * count_ / tiles_;
        const float* left = transformed_ + position * position_step_ + first * depth_step_;
        float* to = products_ + position * position_step_ + first * product_step_ + k + column;
        // The weights can be too many for the second cache: every tile of a panel fetches its part of the next one.
        // That takes layers of 512 channels from 6.4 to 4.0 ms, and others from 4.9 to 4.4.
        const int64_t parts = tiles_ * (panel_columns / Tile<Bytes>::columns);
        const int64_t part = column / Tile<Bytes>::columns * tiles_ + tile;
        const NextPanel fetch(panel + shape_.channels * panel_columns, shape_.channels, part, parts);
        with_constant<Tile<Bytes>::rows>(end - first, [&](auto rows) DETR_FAST_LAMBDA {
            const float* row[rows];
            unrolled<rows>([&](auto r) DETR_FAST_LAMBDA { row[r] = left + r * depth_step_; });
            multiply_tile<Bytes, rows>(
                row, 1, shape_.channels, panel + column, [](auto, auto) DETR_FAST_LAMBDA { return Floats{}; },
                [&](auto r, auto v, const Floats& sum)
                    DETR_FAST_LAMBDA { store_as(to + r * product_step_ + v * width, sum); },
                fetch);
        });
    }

    DETR_FAST_INLINE void transform_products(int64_t i) const {
        const Patch patch = patches_.at(first_ + i);
        const int64_t d = shape_.dilation, column_step = d * shape_.out_channels, row_step = shape_.width * column_step;
        const int64_t corner =
            ((patch.image * shape_.height + patch.top) * shape_.width + patch.left) * shape_.out_channels;
        const float* from = products_ + i * product_step_;
        for (int64_t k = 0; k < shape_.out_channels; k += width) {
            const Floats bias =
                layer_.bias == nullptr ? Floats{} : load_first<Bytes>(layer_.bias + k, shape_.out_channels - k);
            untransform_channels(from + k, [&](auto row, auto column, Floats y) DETR_FAST_LAMBDA {
                if (!holds(patch.top + row * d, patch.left + column * d)) return;
                const int64_t pixel = corner + row * row_step + column * column_step + k;
                y += bias;
                if (layer_.residual != nullptr)
                    y += load_first<Bytes>(layer_.residual + pixel, shape_.out_channels - k);
                if (layer_.relu) y = y < 0.0f ? Floats{} : y;  // in this order NaN stays
                if (layer_.gate != nullptr)
                    y = load_first<Bytes>(layer_.gate + pixel, shape_.out_channels - k) <= 0.0f ? Floats{} : y;
                store_first<Bytes>(layer_.out + pixel, y, shape_.out_channels - k);
            });
        }
    }

    template <typename Finish>
    DETR_FAST_INLINE void untransform_channels(const float* from, const Finish& finish) const {
        Floats rows[outputs][inputs];
        unrolled<inputs>([&](auto column) DETR_FAST_LAMBDA {
            Floats at[inputs], y[outputs];
            unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA {
                at[row] = load_as<Floats>(from + (row * inputs + column) * position_step_);
            });
            output_line(at, y);
            unrolled<outputs>([&](auto row) DETR_FAST_LAMBDA { rows[row][column] = y[row]; });
        });
        unrolled<outputs>([&](auto row) DETR_FAST_LAMBDA {
            Floats y[outputs];
            output_line(rows[row], y);
            unrolled<outputs>([&](auto column) DETR_FAST_LAMBDA { finish(row, column, y[column]); });
        });
    }

    DETR_FAST_INLINE bool holds(int64_t y, int64_t x) const {
        return y >= 0 && x >= 0 && y < shape_.height && x < shape_.width;
    }

    const Layer& layer_;
    const detr_fast_conv& shape_;
    const Patches patches_;
    const int64_t first_, count_, tiles_, depth_step_, product_step_, position_step_;
    float *const products_, *const transformed_;
};

struct BlockTask {
    const Layer& layer;
    int64_t first, end;
    float* memory;

    template <int Bytes>
    bool run() const {
        Block<Bytes>(layer, first, end, memory).run();
        return true;
    }
};

float* aligned(unsigned char* memory) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// As many numbers in float64 as half a register of float32 holds.
template <int Bytes>
struct Wide {
#if defined(DETR_FAST_HAS_VECTORS)
    using Floats = Vector<float, Bytes / 2>;
    using Doubles = Vector<double, Bytes>;
    static DETR_FAST_INLINE Doubles of(const float* x) { return __builtin_convertvector(load_as<Floats>(x), Doubles); }
    static DETR_FAST_INLINE void store(float* to, const Doubles& x) {
        store_as(to, __builtin_convertvector(x, Floats));
    }
#else
    using Doubles = double;
    static double of(const float* x) { return *x; }
    static void store(float* to, double x) { *to = static_cast<float>(x); }
#endif
    static constexpr int64_t width = sizeof(Doubles) / sizeof(double);
};

// A row of a panel, [9, panel_columns], to every position of it, which lie position_step apart.
struct WeightTask {
    const float* taps;
    float* to;
    int64_t position_step;

    template <int Bytes>
    bool run() const {
        for (int64_t column = 0; column < panel_columns; column += Wide<Bytes>::width) transform<Bytes>(column);
        return true;
    }

    template <int Bytes>
    DETR_FAST_INLINE void transform(int64_t column) const {
        using Doubles = typename Wide<Bytes>::Doubles;
        Doubles rows[inputs][3];
        unrolled<3>([&](auto x) DETR_FAST_LAMBDA {
            Doubles w[3], at[inputs];
            unrolled<3>([&](auto y)
                            DETR_FAST_LAMBDA { w[y] = Wide<Bytes>::of(taps + (y * 3 + x) * panel_columns + column); });
            weight_line(w, at);
            unrolled<inputs>([&](auto y) DETR_FAST_LAMBDA { rows[y][x] = at[y]; });
        });
        unrolled<inputs>([&](auto y) DETR_FAST_LAMBDA {
            Doubles at[inputs];
            weight_line(rows[y], at);
            unrolled<inputs>([&](auto x) DETR_FAST_LAMBDA {
                Wide<Bytes>::store(to + (y * inputs + x) * position_step + column, at[x]);
            });
        });
    }
};

}  // namespace
}  // namespace detr_fast

int64_t detr_fast_winograd_packed_floats(const detr_fast_conv* shape) {
    using namespace detr_fast;
    return positions * packed_floats(shape->channels, shape->out_channels);
}

void detr_fast_winograd_pack(const detr_fast_conv* shape, const detr_fast_conv_weight* weight, float* packed,
                             int threads) {
    using namespace detr_fast;
    const int64_t channels = shape->channels, position_step = packed_floats(channels, shape->out_channels);
    const WeightBlock of(*shape);
    const int64_t blocks = of.blocks_of_panel();
    parallel_for(panels_of(shape->out_channels) * blocks, threads, [&](int64_t i) {
        const int64_t panel = i / blocks, block = i % blocks, first = of.first_channel(block);
        std::vector<float> rows(static_cast<size_t>(of.floats()));
        of.gather(*weight, panel, block, rows.data());
        for (int64_t c = first; c < of.end_channel(block); ++c) {
            float* to = packed + (panel * channels + c) * panel_columns;
            with_widest_vectors(WeightTask{rows.data() + (c - first) * 9 * panel_columns, to, position_step});
        }
    });
}

void detr_fast_winograd_cpu(const detr_fast_conv* shape, const float* x, const float* packed, const float* bias,
                            const float* residual, const float* gate, bool relu, float* out, int threads) {
    using namespace detr_fast;
    const Layer layer{*shape, x, packed, bias, residual, gate, relu, out};
    const int64_t patches = Patches(*shape).count, blocks = blocks_of(*shape, patches, std::max(threads, 1));
    parallel_for(blocks, threads, [&](int64_t block) {
        const int64_t first = block * patches / blocks, end = (block + 1) * patches / blocks;
        const int64_t floats = (positions + 1) * position_floats(*shape, end - first);
        static thread_local Scratch scratch;
        unsigned char* memory = scratch.reserve(static_cast<size_t>(floats) * sizeof(float) + 64);
        with_widest_vectors(BlockTask{layer, first, end, aligned(memory)});
        scratch.release_if_large();
    });
}
