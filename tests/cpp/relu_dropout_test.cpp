// csrc/cpu/relu_dropout.cpp under sanitizers: all dtypes, in place and not, on several threads at once, in arrays that
// are no larger than they have to be. Exits with 0 where all is well.

#include "relu_dropout.h"

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

// Of any dtype whose numbers have these bytes: 1, -2, 1, -2, ... where T is float or double.
template <typename T>
void run(int64_t rows, int64_t columns, int32_t dtype, bool in_place, int threads) {
    std::vector<T> x(rows * columns), y(x.size()), grad(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(i % 2 == 0 ? 1 : -2);
    const std::vector<T> before = x;
    const int64_t seed = 12345;
    const detr_fast_relu_dropout in{rows, columns, {x.data(), columns, dtype}, &seed, 32768, 2.0};
    T* result = in_place ? x.data() : y.data();
    detr_fast_relu_dropout_cpu(&in, result, threads);
    const detr_fast_relu_dropout incoming{rows, columns, {before.data(), columns, dtype}, nullptr, 0, 2.0};
    const detr_fast_rows output{result, columns, dtype};
    detr_fast_relu_dropout_backward_cpu(&incoming, &output, grad.data(), threads);
    if (dtype != detr_fast_float32 && dtype != detr_fast_float64) return;
    int64_t kept = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        require(result[i] == 0 || (result[i] == 2 && before[i] == 1), "what is kept is positive, and doubled");
        require(grad[i] == (result[i] > 0 ? 2 : 0), "the gradient flows where the result is positive");
        kept += result[i] > 0;
    }
    const auto all = static_cast<int64_t>(x.size());
    require(all < 1000 || (kept * 5 > all && kept * 10 < all * 3), "half of the positive half is kept");
}

void run_all(int threads) {
    for (const int64_t columns : {1, 33, 257}) {
        for (const int64_t rows : {0, 1, 300}) {
            for (const bool in_place : {false, true}) {
                run<float>(rows, columns, detr_fast_float32, in_place, threads);
                run<double>(rows, columns, detr_fast_float64, in_place, threads);
                run<uint16_t>(rows, columns, detr_fast_bfloat16, in_place, threads);
                run<uint16_t>(rows, columns, detr_fast_float16, in_place, threads);
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
