// The gradient of a 3x3 weight as the transpose of Winograd's convolution: at each of 36 positions a matrix product
// over the patches of all images, [out_channels, patches] x [patches, channels].

#include <algorithm>

#include "gemm_tile.h"
#include "solver.h"
#include "thread_pool.h"
#include "widths.h"
#include "winograd.h"
#include "winograd_patches.h"

namespace detr_fast {
namespace {

using namespace winograd;

// Of the transformed map and gradient: more patches are taken in several rounds.
constexpr int64_t most_floats = int64_t{8} << 20;
// Their sums at all positions take 600 KB, which stay in L2 beside the factors of one position.
constexpr int64_t rows_at_once = 66;
// Sums of so many are formed by themselves, with a third of the rounding error; their factors stay in the first cache.
constexpr int64_t patches_at_once = 64;
constexpr int64_t tile_rows = 6;  // of every width
constexpr int64_t taps = 9;

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

struct Round {
    const detr_fast_conv& shape;
    const float* x;
    const float* grad;
    const float* scale;
    float* of_weight;
    int64_t first, count;  // patches
    float* inputs_at;      // [positions, panels, patches, panel_columns]
    float* grads_at;       // [positions, patches, out_channels in whole vectors]
    bool adds;             // to what rounds before have found

    int64_t panels() const { return panels_of(shape.channels); }
    int64_t grad_step() const { return padded(shape.out_channels); }
    // The line behind them keeps the positions from falling into the same sets of the cache, and a last tile reads it.
    int64_t input_positions() const { return panels() * count * panel_columns + 16; }
    int64_t grad_positions() const { return count * grad_step() + 16; }
};

struct TransformTask {
    const Round& round;
    int64_t i;

    template <int Bytes>
    bool run() const {
        const Patch patch = Patches(round.shape).at(round.first + i);
        inputs_of<Bytes>(patch);
        grads_of<Bytes>(patch);
        return true;
    }

    DETR_FAST_INLINE const float* pixel(const float* map, const Patch& patch, int64_t y, int64_t x,
                                        int64_t channels) const {
        const auto& s = round.shape;
        if (y < 0 || x < 0 || y >= s.height || x >= s.width) return nullptr;
        return map + ((patch.image * s.height + y) * s.width + x) * channels;
    }

    template <int Bytes>
    DETR_FAST_INLINE void inputs_of(const Patch& patch) const {
        using Floats = typename Registers<Bytes>::Floats;
        const auto& s = round.shape;
        const float* pixels[winograd::inputs][winograd::inputs];
        for (int64_t y = 0; y < winograd::inputs; ++y) {
            for (int64_t x = 0; x < winograd::inputs; ++x) {
                const int64_t top = patch.top + (y - 1) * s.dilation, left = patch.left + (x - 1) * s.dilation;
                pixels[y][x] = pixel(round.x, patch, top, left, s.channels);
            }
        }
        for (int64_t c = 0; c < s.channels; c += Registers<Bytes>::width) {
            const int64_t panel = c / panel_columns;
            float* to = round.inputs_at + (panel * round.count + i) * panel_columns + c % panel_columns;
            transform_inputs<Bytes>(to, round.input_positions(), [&](auto y, auto x) DETR_FAST_LAMBDA {
                const float* from = pixels[y][x];
                return from == nullptr ? Floats{} : load_first<Bytes>(from + c, s.channels - c);
            });
        }
    }

    template <int Bytes>
    DETR_FAST_INLINE void grads_of(const Patch& patch) const {
        using Floats = typename Registers<Bytes>::Floats;
        const auto& s = round.shape;
        const float* pixels[outputs][outputs];
        for (int64_t y = 0; y < outputs; ++y) {
            for (int64_t x = 0; x < outputs; ++x) {
                const int64_t top = patch.top + y * s.dilation, left = patch.left + x * s.dilation;
                pixels[y][x] = pixel(round.grad, patch, top, left, s.out_channels);
            }
        }
        for (int64_t k = 0; k < s.out_channels; k += Registers<Bytes>::width) {
            Floats rows[winograd::inputs][outputs];
            unrolled<outputs>([&](auto x) DETR_FAST_LAMBDA {
                Floats y[outputs], at[winograd::inputs];
                unrolled<outputs>([&](auto row) DETR_FAST_LAMBDA {
                    const float* from = pixels[row][x];
                    y[row] = from == nullptr ? Floats{} : load_first<Bytes>(from + k, s.out_channels - k);
                });
                gradient_line(y, at);
                unrolled<winograd::inputs>([&](auto row) DETR_FAST_LAMBDA { rows[row][x] = at[row]; });
            });
            float* to = round.grads_at + i * round.grad_step() + k;
            unrolled<winograd::inputs>([&](auto row) DETR_FAST_LAMBDA {
                Floats at[winograd::inputs];
                gradient_line(rows[row], at);
                unrolled<winograd::inputs>([&](auto x) DETR_FAST_LAMBDA {
                    store_as(to + (row * winograd::inputs + x) * round.grad_positions(), at[x]);
                });
            });
        }
    }
};

// Out channels [first, end) and a panel of channels: sums at all positions, and back to taps.
struct SumTask {
    const Round& round;
    int64_t first, end, panel;
    float* sums;  // [positions, rows(), panel_columns]

    template <int Bytes>
    bool run() const {
        for (int64_t position = 0; position < positions; ++position) {
            for (int64_t i = 0; i < round.count; i += patches_at_once) {
                const int64_t i_end = std::min(i + patches_at_once, round.count);
                for (int64_t k = 0; k < rows(); k += Tile<Bytes>::rows) {
                    for (int64_t column = 0; column < panel_columns; column += Tile<Bytes>::columns) {
                        tile<Bytes>(position, i, i_end, k, column);
                    }
                }
            }
        }
        for (int64_t k = first; k < std::min(end, round.shape.out_channels); ++k) write<Bytes>(k);
        return true;
    }

    // Whole tiles: rows beyond the last hold what nobody reads.
    int64_t rows() const { return rows_of(end - first); }
    static int64_t rows_of(int64_t count) { return (count + tile_rows - 1) / tile_rows * tile_rows; }

    DETR_FAST_INLINE float* sums_of(int64_t position, int64_t row) const {
        return sums + (position * rows() + row) * panel_columns;
    }

    template <int Bytes>
    DETR_FAST_INLINE void tile(int64_t position, int64_t i, int64_t i_end, int64_t row, int64_t column) const {
        using Floats = typename Tile<Bytes>::Floats;
        constexpr int tile_rows = Tile<Bytes>::rows, vectors = Tile<Bytes>::vectors, width = Registers<Bytes>::width;
        const float* left = round.grads_at + position * round.grad_positions() + i * round.grad_step() + first + row;
        const float* right =
            round.inputs_at + position * round.input_positions() + (panel * round.count + i) * panel_columns + column;
        Floats sum[tile_rows][vectors];
        const auto each = [&](const auto& visit) DETR_FAST_LAMBDA {
            unrolled<tile_rows>([&](auto r) DETR_FAST_LAMBDA {
                unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA { visit(r, v, sum[r][v]); });
            });
        };
        each([](auto, auto, Floats& s) DETR_FAST_LAMBDA { s = Floats{}; });
        for (int64_t patch = i; patch < i_end; ++patch, left += round.grad_step(), right += panel_columns) {
            Floats factor[vectors];
            unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA { factor[v] = load_as<Floats>(right + v * width); });
            each([&](auto r, auto v, Floats& s) DETR_FAST_LAMBDA { s += left[r] * factor[v]; });
        }
        each([&](auto r, auto v, const Floats& s) DETR_FAST_LAMBDA {
            float* to = sums_of(position, row + r) + column + v * width;
            store_as(to, i == 0 ? s : load_as<Floats>(to) + s);
        });
    }

    // In float64, which costs nothing beside the sums.
    template <int Bytes>
    DETR_FAST_INLINE void write(int64_t k) const {
        using Doubles = typename Wide<Bytes>::Doubles;
        const int64_t channels = round.shape.channels, c = panel * panel_columns;
        const int64_t columns = std::min(panel_columns, channels - c);
        const double factor = round.scale == nullptr ? 1.0 : round.scale[k];
        float line[taps * panel_columns];
        for (int64_t column = 0; column < panel_columns; column += Wide<Bytes>::width) {
            Doubles rows[3][winograd::inputs];
            unrolled<winograd::inputs>([&](auto x) DETR_FAST_LAMBDA {
                Doubles at[winograd::inputs], w[3];
                unrolled<winograd::inputs>([&](auto y) DETR_FAST_LAMBDA {
                    at[y] = Wide<Bytes>::of(sums_of(y * winograd::inputs + x, k - first) + column);
                });
                weight_gradient_line(at, w);
                unrolled<3>([&](auto y) DETR_FAST_LAMBDA { rows[y][x] = w[y]; });
            });
            unrolled<3>([&](auto y) DETR_FAST_LAMBDA {
                Doubles w[3];
                weight_gradient_line(rows[y], w);
                unrolled<3>([&](auto x) DETR_FAST_LAMBDA {
                    Wide<Bytes>::store(line + (y * 3 + x) * panel_columns + column, factor * w[x]);
                });
            });
        }
        float* to = round.of_weight + (k * channels + c) * taps;
        for (int64_t column = 0; column < columns; ++column, to += taps) {
            for (int64_t t = 0; t < taps; ++t) {
                to[t] = line[t * panel_columns + column] + (round.adds ? to[t] : 0.0f);
            }
        }
    }
};

void run_round(const Round& round, int threads) {
    parallel_for(round.count, threads, [&](int64_t i) { with_widest_vectors(TransformTask{round, i}); });
    const int64_t outs = round.grad_step(), groups = (outs + rows_at_once - 1) / rows_at_once;
    parallel_for(groups * round.panels(), threads, [&](int64_t task) {
        const int64_t group = task / round.panels(), panel = task % round.panels();
        const int64_t first = group * outs / groups, end = (group + 1) * outs / groups;
        static thread_local Scratch scratch;
        float* sums = reserve_floats(scratch, positions * SumTask::rows_of(end - first) * panel_columns);
        with_widest_vectors(SumTask{round, first, end, panel, sums});
    });
}

}  // namespace
}  // namespace detr_fast

void detr_fast_winograd_weight_gradient_cpu(const detr_fast_conv* shape, const float* x, const float* grad,
                                            const float* scale, float* of_weight, int threads) {
    using namespace detr_fast;
    const int64_t patches = Patches(*shape).count;
    const int64_t floats = positions * (padded(shape->channels) + padded(shape->out_channels));
    const int64_t each = std::max<int64_t>(1, most_floats / floats), rounds = (patches + each - 1) / each;
    if (patches == 0) std::fill_n(of_weight, shape->out_channels * shape->channels * taps, 0.0f);
    static thread_local Scratch scratch;
    for (int64_t i = 0; i < rounds; ++i) {
        const int64_t first = i * patches / rounds, count = (i + 1) * patches / rounds - first;
        Round round{*shape, x, grad, scale, of_weight, first, count, nullptr, nullptr, i > 0};
        const int64_t of_inputs = positions * round.input_positions(), of_grads = positions * round.grad_positions();
        round.inputs_at = reserve_floats(scratch, of_inputs + of_grads);
        round.grads_at = round.inputs_at + of_inputs;
        run_round(round, threads);
    }
    scratch.release_if_large();
}
