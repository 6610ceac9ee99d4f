// Convolutions against the sums as written, at every width of vectors. Every array is as long as it must be and no
// longer, so that the address sanitizer sees a step beyond.

#include "conv.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "../../tests/cpp/require.h"
#include "conv_max_pool.h"
#include "widths.h"

namespace {

using Floats = std::vector<float>;

Floats random_floats(int64_t count) {
    static std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    Floats numbers(static_cast<size_t>(count));
    for (float& number : numbers) number = normal(generator);
    numbers.shrink_to_fit();
    return numbers;
}

detr_fast_conv with_out_size(detr_fast_conv s) {
    s.out_height = (s.height + 2 * s.padding - s.dilation * (s.kernel_height - 1) - 1) / s.stride + 1;
    s.out_width = (s.width + 2 * s.padding - s.dilation * (s.kernel_width - 1) - 1) / s.stride + 1;
    return s;
}

float sum_at(const detr_fast_conv& s, const Floats& x, const Floats& weight, int64_t image, int64_t row, int64_t column,
             int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < s.kernel_height; ++i) {
        for (int64_t j = 0; j < s.kernel_width; ++j) {
            const int64_t y = row * s.stride - s.padding + i * s.dilation;
            const int64_t z = column * s.stride - s.padding + j * s.dilation;
            if (y < 0 || y >= s.height || z < 0 || z >= s.width) continue;
            for (int64_t c = 0; c < s.channels; ++c) {
                sum += static_cast<double>(x[((image * s.height + y) * s.width + z) * s.channels + c]) *
                       weight[((k * s.channels + c) * s.kernel_height + i) * s.kernel_width + j];
            }
        }
    }
    return static_cast<float>(sum);
}

Floats convolved(const detr_fast_conv& s, const Floats& x, const Floats& weight, const Floats& bias) {
    Floats out;
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t y = 0; y < s.out_height; ++y) {
            for (int64_t z = 0; z < s.out_width; ++z) {
                for (int64_t k = 0; k < s.out_channels; ++k) out.push_back(sum_at(s, x, weight, b, y, z, k) + bias[k]);
            }
        }
    }
    return out;
}

// Sums of up to 2700 products of normal numbers, in float.
void require_close(const Floats& found, const Floats& expected, const char* what) {
    for (size_t i = 0; i < expected.size(); ++i) {
        require(std::abs(found[i] - expected[i]) <= 1e-3f, std::string(what) + " at " + std::to_string(i));
    }
}

// The highest of 3x3, with stride 2 and padding 1, and 0.
Floats pooled(const detr_fast_conv& s, const Floats& map) {
    const int64_t height = (s.out_height + 1) / 2, width = (s.out_width + 1) / 2;
    Floats out(static_cast<size_t>(s.batch * height * width * s.out_channels), 0.0f);
    for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t y = 0; y < s.out_height; ++y) {
            for (int64_t z = 0; z < s.out_width; ++z) {
                for (int64_t r = y / 2; r <= (y + 1) / 2 && r < height; ++r) {
                    for (int64_t c = z / 2; c <= (z + 1) / 2 && c < width; ++c) {
                        for (int64_t k = 0; k < s.out_channels; ++k) {
                            float& highest = out[((b * height + r) * width + c) * s.out_channels + k];
                            highest =
                                std::max(highest, map[((b * s.out_height + y) * s.out_width + z) * s.out_channels + k]);
                        }
                    }
                }
            }
        }
    }
    return out;
}

void test(const detr_fast_conv& shape, int threads) {
    const detr_fast_conv s = with_out_size(shape);
    const Floats x = random_floats(s.batch * s.height * s.width * s.channels);
    const Floats weight = random_floats(s.out_channels * s.channels * s.kernel_height * s.kernel_width);
    const Floats bias = random_floats(s.out_channels);
    Floats packed(static_cast<size_t>(detr_fast_conv_packed_floats(&s)), NAN);
    const detr_fast_conv_weight from{weight.data(), nullptr, false};
    detr_fast_conv_pack(&s, &from, packed.data(), threads);
    const Floats expected = convolved(s, x, weight, bias);
    Floats out(expected.size(), NAN);
    detr_fast_conv_cpu(&s, x.data(), packed.data(), bias.data(), nullptr, nullptr, false, out.data(), threads);
    require_close(out, expected, "conv");
    detr_fast_conv_cpu(&s, x.data(), packed.data(), bias.data(), out.data(), nullptr, true, out.data(), threads);
    Floats twice = expected;
    for (float& number : twice) number = std::max(0.0f, 2.0f * number);
    require_close(out, twice, "conv with residual and ReLU");
    if (s.dilation != 1) return;
    const Floats highest = pooled(s, expected);
    Floats small(highest.size(), NAN);
    const int64_t strides[4] = {s.height * s.width * s.channels, 1, s.width * s.channels, s.channels};
    detr_fast_conv_max_pool_cpu(&s, x.data(), strides, packed.data(), bias.data(), small.data(), threads);
    require_close(small, highest, "conv_max_pool");
}

}  // namespace

int main() {
    for (const int bytes : {16, 32, 64}) {
        detr_fast::limit_vector_bytes(bytes);
        for (const int threads : {1, 3}) {
            test({1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1}, threads);
            test({2, 5, 7, 33, 0, 0, 70, 1, 1, 1, 0, 1}, threads);
            test({1, 9, 8, 24, 0, 0, 64, 1, 1, 2, 0, 1}, threads);
            test({2, 6, 5, 16, 0, 0, 40, 3, 3, 1, 1, 1}, threads);
            test({1, 9, 7, 8, 0, 0, 65, 3, 3, 2, 1, 1}, threads);
            test({1, 8, 6, 8, 0, 0, 64, 3, 3, 1, 2, 2}, threads);
            test({1, 13, 20, 3, 0, 0, 64, 7, 7, 2, 3, 1}, threads);
            test({1, 4, 5, 300, 0, 0, 64, 3, 3, 1, 1, 1}, threads);  // the taps in several parts
        }
    }
    return 0;
}
