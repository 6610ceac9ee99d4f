// csrc/cpu/add_layer_norm.cpp under sanitizers: all dtypes, with and without dropout and position, on several threads
// at once, in arrays that are no larger than they have to be. Exits with 0 where all is well.

#include "add_layer_norm.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

size_t bytes_of(int32_t dtype) {
    return dtype == detr_fast_float64 ? 8 : dtype == detr_fast_float32 ? 4 : 2;
}

using Bytes = std::vector<unsigned char>;

// A bfloat16 or float16 whose bits are 0x3c00 or so is a small positive number; so are floats and doubles made of them.
Bytes numbers(int64_t count, int32_t dtype, int salt) {
    Bytes memory(count * bytes_of(dtype));
    for (size_t i = 0; i < memory.size(); ++i)
        memory[i] = i % 2 == 1 ? 0x3c : static_cast<unsigned char>(i * 37 + salt);
    return memory;
}

// Checks that the gradient of a layer norm is orthogonal to ones: its rows sum to 0.
template <typename Real>
void run(int64_t rows, int64_t columns, int32_t dtype, bool with_dropout, bool with_pos, int threads) {
    const bool is_double = dtype == detr_fast_float64;
    const Bytes x = numbers(rows * columns, dtype, 1);
    const Bytes residual = numbers(rows * (columns + 3), dtype, 2);
    const Bytes pos = numbers(columns, dtype, 3);
    const std::vector<Real> weight(columns, Real(1.5));
    const std::vector<Real> bias(columns, Real(0.25));
    const int64_t seed = -5;
    const detr_fast_add_layer_norm in{rows,
                                      columns,
                                      {x.data(), columns, dtype},
                                      {residual.data(), columns + 3, dtype},
                                      weight.data(),
                                      with_dropout ? &seed : nullptr,
                                      6554,
                                      1.0 / 0.9,
                                      is_double};
    Bytes y(x.size()), y_pos(x.size()), grad_x(x.size()), grad_residual(x.size());
    std::vector<Real> mean(rows), rstd(rows), grad_weight(columns), grad_bias(columns);
    const detr_fast_add_layer_norm_outputs out{bias.data(),
                                               1e-5,
                                               {pos.data(), columns, dtype},
                                               with_pos ? 1 : 0,
                                               y.data(),
                                               with_pos ? y_pos.data() : nullptr,
                                               dtype,
                                               mean.data(),
                                               rstd.data()};
    detr_fast_add_layer_norm_cpu(&in, &out, threads);
    const detr_fast_add_layer_norm_gradients gradients{{x.data(), columns, dtype},
                                                       {with_pos ? y_pos.data() : nullptr, columns, dtype},
                                                       mean.data(),
                                                       rstd.data(),
                                                       grad_x.data(),
                                                       grad_residual.data(),
                                                       grad_weight.data(),
                                                       grad_bias.data()};
    detr_fast_add_layer_norm_backward_cpu(&in, &gradients, threads);
    for (const Real r : rstd) require(r > 0 && std::isfinite(r), "every row has a deviation");
    if (dtype != detr_fast_float32 && !is_double) return;
    for (int64_t i = 0; i < rows; ++i) {
        const Real* row = reinterpret_cast<const Real*>(grad_residual.data()) + i * columns;
        Real sum = 0;
        Real size = 0;
        for (int64_t c = 0; c < columns; ++c) {
            sum += row[c];
            size += std::abs(row[c]);
        }
        require(std::abs(sum) <= Real(1e-4) * size + Real(1e-3), "a gradient is orthogonal to ones");
    }
}

void run_all(int threads) {
    for (const int64_t columns : {1, 31, 256}) {
        for (const int64_t rows : {0, 1, 150}) {
            for (const bool with_dropout : {false, true}) {
                for (const bool with_pos : {false, true}) {
                    run<float>(rows, columns, detr_fast_float32, with_dropout, with_pos, threads);
                    run<double>(rows, columns, detr_fast_float64, with_dropout, with_pos, threads);
                    run<float>(rows, columns, detr_fast_bfloat16, with_dropout, with_pos, threads);
                    run<float>(rows, columns, detr_fast_float16, with_dropout, with_pos, threads);
                }
            }
        }
    }
}

}  // namespace

int main() {
    std::thread other([] { run_all(2); });
    run_all(3);
    other.join();
}
