// csrc/cpu/bottleneck.cpp under sanitizers, in arrays that are no larger than they have to be, against sums as they are
// defined. Throws where something is wrong.

#include "bottleneck.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "require.h"

namespace {

using Floats = std::vector<float>;

Floats random_floats(int64_t count, float scale) {
    static std::mt19937 generator(7);
    std::normal_distribution<float> normal(0, scale);
    Floats numbers(static_cast<size_t>(count));
    for (float& number : numbers) number = normal(generator);
    return numbers;
}

// A convolution that keeps the size of a map.
struct Conv {
    Floats weight, packed, bias;
    detr_fast_packed_conv conv;

    Conv(int64_t channels, int64_t out_channels, int64_t kernel)
        : weight(random_floats(out_channels * channels * kernel * kernel,
                               1 / std::sqrt(static_cast<float>(channels * kernel * kernel)))),
          bias(random_floats(out_channels, 1)) {
        const detr_fast_conv shape{1, 1, 1, channels, 1, 1, out_channels, kernel, kernel, 1, kernel / 2, 1};
        packed.assign(static_cast<size_t>(detr_fast_conv_packed_floats(&shape)), NAN);
        const detr_fast_conv_weight from{weight.data(), nullptr, false};
        detr_fast_conv_pack(&shape, &from, packed.data(), 1);
        conv = {channels, out_channels, kernel, kernel, 1, kernel / 2, 1, packed.data(), bias.data()};
    }

    float sum(const detr_fast_map& map, const Floats& x, int64_t image, int64_t row, int64_t column, int64_t k) const {
        const int64_t kernel = conv.kernel_height, channels = conv.channels;
        float sum = bias[k];
        for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
            const int64_t i = row + tap / kernel - conv.padding, j = column + tap % kernel - conv.padding;
            if (i < 0 || j < 0 || i >= map.height || j >= map.width) continue;
            const float* const pixel = &x[((image * map.height + i) * map.width + j) * channels];
            const float* const of_tap = &weight[k * channels * kernel * kernel + tap];
            for (int64_t c = 0; c < channels; ++c) sum += pixel[c] * of_tap[c * kernel * kernel];
        }
        return sum;
    }

    Floats run(const detr_fast_map& map, const Floats& x, const Floats* residual, bool relu) const {
        Floats out;
        for (int64_t pixel = 0; pixel < map.batch * map.height * map.width; ++pixel) {
            const int64_t row = pixel / map.width, image = row / map.height;
            for (int64_t k = 0; k < conv.out_channels; ++k) {
                float y = sum(map, x, image, row % map.height, pixel % map.width, k);
                if (residual != nullptr) y += (*residual)[out.size()];
                out.push_back(relu ? std::max(0.0f, y) : y);
            }
        }
        return out;
    }
};

void test(const detr_fast_map& map, int64_t channels, bool in_place) {
    const Conv reduce(channels, 64, 1), middle(64, 64, 3), expand(64, 64, 1), past(channels, 64, 1);
    const detr_fast_packed_conv convs[] = {reduce.conv, middle.conv, expand.conv};
    const detr_fast_conv_block block{convs, 3, in_place ? nullptr : &past.conv};
    require(detr_fast::is_bottleneck(block, map), "goes depth first");
    const Floats x = random_floats(map.batch * map.height * map.width * channels, 1);
    const Floats residual = in_place ? x : past.run(map, x, nullptr, false);
    const Floats inner = middle.run(map, reduce.run(map, x, nullptr, true), nullptr, true);
    const Floats expected = expand.run(map, inner, &residual, true);
    for (const int threads : {1, 3}) {
        Floats out = in_place ? x : Floats(expected.size(), NAN);
        detr_fast::run_bottleneck(block, map, in_place ? out.data() : x.data(), out.data(), threads);
        for (size_t i = 0; i < out.size(); ++i) require(std::abs(out[i] - expected[i]) < 1e-3f, "a bottleneck");
    }
}

}  // namespace

void test_bottlenecks() {
    test({2, 13, 11}, 24, false);
    test({1, 9, 31}, 64, true);
}
