// csrc/cpu/winograd.cpp and winograd_weight_gradient.cpp under sanitizers, in arrays that are no larger than they have
// to be, by several callers at once, against sums as they are defined. Exits with 0 where all is well.

#include "winograd.h"

#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "require.h"

namespace {

using Floats = std::vector<float>;

Floats random_floats(int64_t count, int seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    Floats numbers(count);
    for (float& x : numbers) x = normal(random);
    return numbers;
}

struct Case {
    int64_t images, height, width, channels, outputs, dilation;
    bool with_bias, with_residual, relu;
};

struct Layer {
    Case size;
    Floats input, weight, bias, residual, packed;

    explicit Layer(const Case& c)
        : size(c),
          input(random_floats(c.images * c.height * c.width * c.channels, 1)),
          weight(random_floats(c.outputs * c.channels * 9, 2)),
          bias(random_floats(c.outputs, 3)),
          residual(random_floats(c.images * c.height * c.width * c.outputs, 4)) {
        const detr_fast_conv sizes = shape();
        packed.resize(detr_fast_conv_packed_floats(&sizes));
        const detr_fast_conv_weight from{weight.data(), nullptr, false};
        detr_fast_conv_pack(&sizes, &from, packed.data(), 2);
    }

    detr_fast_conv shape() const {
        return {size.images, size.height, size.width, size.channels, size.height,  size.width, size.outputs,
                3,           3,           1,          size.dilation, size.dilation};
    }

    Floats run(int threads) const {
        Floats output(residual.size(), NAN);
        const detr_fast_conv sizes = shape();
        detr_fast_winograd_cpu(&sizes, input.data(), packed.data(), size.with_bias ? bias.data() : nullptr,
                               size.with_residual ? residual.data() : nullptr, nullptr, size.relu, output.data(),
                               threads);
        return output;
    }

    double sum(int64_t image, int64_t y, int64_t x, int64_t k) const {
        double total = size.with_bias ? bias[k] : 0.0;
        for (int64_t i = 0; i < 9; ++i) {
            const int64_t row = y + (i / 3 - 1) * size.dilation, column = x + (i % 3 - 1) * size.dilation;
            if (row < 0 || column < 0 || row >= size.height || column >= size.width) continue;
            const float* pixel = &input[((image * size.height + row) * size.width + column) * size.channels];
            for (int64_t c = 0; c < size.channels; ++c)
                total += double(pixel[c]) * weight[(k * size.channels + c) * 9 + i];
        }
        return total;
    }

    // Of the output's gradient, for which the residual stands.
    Floats weight_gradient(int threads) const {
        Floats gradient(weight.size(), NAN);
        const detr_fast_conv sizes = shape();
        detr_fast_winograd_weight_gradient_cpu(&sizes, input.data(), residual.data(),
                                               size.with_bias ? bias.data() : nullptr, gradient.data(), threads);
        return gradient;
    }

    void check_weight_gradient(const Floats& gradient) const {
        std::vector<double> expected(gradient.size());
        for (int64_t i = 0; i < static_cast<int64_t>(residual.size()); ++i) {
            const int64_t k = i % size.outputs, pixel = i / size.outputs, x = pixel % size.width;
            const int64_t image = pixel / size.width / size.height, y = pixel / size.width % size.height;
            for (int64_t tap = 0; tap < 9; ++tap) {
                const int64_t row = y + (tap / 3 - 1) * size.dilation, column = x + (tap % 3 - 1) * size.dilation;
                if (row < 0 || column < 0 || row >= size.height || column >= size.width) continue;
                const float* from = &input[((image * size.height + row) * size.width + column) * size.channels];
                double* to = &expected[k * size.channels * 9 + tap];
                for (int64_t c = 0; c < size.channels; ++c) to[c * 9] += double(from[c]) * residual[i];
            }
        }
        const double tolerance = 1e-5 * std::sqrt(double(size.images * size.height * size.width));
        for (size_t i = 0; i < gradient.size(); ++i) {
            const double factor = size.with_bias ? bias[i / (size.channels * 9)] : 1.0;
            const double allowed = tolerance * std::max(1.0, std::abs(factor));
            require(std::abs(gradient[i] - factor * expected[i]) <= allowed, "gradients are the sums that define them");
        }
    }

    void check(const Floats& output) const {
        const double tolerance = 1e-5 * std::sqrt(9.0 * size.channels);
        for (int64_t i = 0; i < static_cast<int64_t>(output.size()); ++i) {
            const int64_t k = i % size.outputs, pixel = i / size.outputs, row = pixel / size.width;
            double expected = sum(row / size.height, row % size.height, pixel % size.width, k);
            if (size.with_residual) expected += residual[i];
            if (size.relu) expected = std::max(expected, 0.0);
            require(std::abs(output[i] - expected) <= tolerance, "outputs are the sums that define them");
        }
    }
};

void run(const Case& c) {
    const Layer layer(c);
    const Floats output = layer.run(1), again = layer.run(3);
    layer.check(output);
    const bool same = std::memcmp(output.data(), again.data(), output.size() * sizeof(float)) == 0;
    require(same, "the number of threads changes no bit");
    const Floats gradient = layer.weight_gradient(1);
    layer.check_weight_gradient(gradient);
    require(gradient == layer.weight_gradient(3), "nor one of the gradient");
}

void run_all() {
    run({1, 1, 1, 1, 1, 1, false, false, false});
    run({2, 5, 9, 3, 17, 1, true, true, true});
    run({1, 13, 6, 16, 64, 1, true, false, false});
    run({1, 4, 8, 33, 70, 1, false, true, false});
    run({3, 7, 3, 20, 5, 2, true, true, false});
    run({1, 10, 11, 8, 32, 3, true, false, true});
    run({1, 2, 40, 65, 8, 1, false, false, true});
    // Too many weights to be transformed beforehand.
    run({2, 9, 6, 130, 170, 1, true, true, true});
}

}  // namespace

void test_bottlenecks();  // bottleneck_test.cpp

int main() {
    std::thread other(run_all);
    run_all();
    other.join();
    test_bottlenecks();
    const Layer none({0, 8, 8, 4, 4, 1, true, true, true});
    require(none.run(2).empty(), "no image, no output");
    for (const float x : none.weight_gradient(2)) require(x == 0, "and no gradient");
}
