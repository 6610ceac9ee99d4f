#include "relu_dropout.h"

#include <algorithm>
#include <type_traits>

#include "dropout.h"
#include "rows.h"
#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

using Inputs = detr_fast_relu_dropout;

// What a number is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline void forward_row(const Inputs& in, const T* x, const uint16_t* __restrict__ random, T* y) {
    const auto scale = static_cast<Wide<T>>(in.scale);
    const auto threshold = static_cast<int32_t>(in.threshold);
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t c = 0; c < in.columns; ++c) {
        const Wide<T> value = widened(x[c]);
        const Wide<T> positive = value < 0 ? Wide<T>(0) : value;  // NaN stays NaN
        narrow(random[c] < threshold ? Wide<T>(0) : positive * scale, y[c]);
    }
}

template <typename T>
inline void backward_row(const Inputs& in, const T* grad, const T* __restrict__ y, T* grad_x) {
    const auto scale = static_cast<Wide<T>>(in.scale);
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t c = 0; c < in.columns; ++c) {
        narrow(widened(y[c]) > 0 ? static_cast<Wide<T>>(widened(grad[c])) * scale : Wide<T>(0), grad_x[c]);
    }
}

DETR_FAST_CLONES void run_forward(const Inputs& in, void* y, int64_t first, int64_t end) {
    static thread_local Scratch memory;
    const int64_t padded = (in.columns + dropout_columns_at_once - 1) / dropout_columns_at_once;
    auto* random = reinterpret_cast<uint16_t*>(memory.reserve(2 * padded * dropout_columns_at_once));
    const auto seed = static_cast<uint64_t>(*in.seed);
    for (int64_t i = first; i < end; ++i) {
        fill_random(seed, 0, 0, static_cast<uint32_t>(i), 0, in.columns, random);
        visit_row(in.x, i, [&](const auto* x) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
            forward_row(in, x, random, static_cast<T*>(y) + i * in.columns);
        });
    }
}

DETR_FAST_CLONES void run_backward(const Inputs& in, const detr_fast_rows& y, void* grad_x, int64_t first,
                                   int64_t end) {
    for (int64_t i = first; i < end; ++i) {
        visit_row(in.x, i, [&](const auto* grad) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(grad)>>;
            backward_row(in, grad, static_cast<const T*>(y.address) + i * y.stride,
                         static_cast<T*>(grad_x) + i * in.columns);
        });
    }
}

// Elements that take as long as waking another thread.
constexpr int64_t work_worth_a_thread = 1 << 15;
constexpr int64_t elements_per_task = 1 << 14;

template <typename Run>
void for_rows(const Inputs& in, int threads, const Run& run) {
    const int64_t each = std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, in.columns));
    const int64_t useful = std::clamp<int64_t>(in.rows * in.columns / work_worth_a_thread, 1, threads);
    parallel_for((in.rows + each - 1) / each, static_cast<int>(useful),
                 [&](int64_t task) { run(task * each, std::min(in.rows, (task + 1) * each)); });
}

}  // namespace
}  // namespace detr_fast

void detr_fast_relu_dropout_cpu(const detr_fast_relu_dropout* in, void* y, int threads) {
    detr_fast::for_rows(*in, threads, [&](int64_t first, int64_t end) { detr_fast::run_forward(*in, y, first, end); });
}

void detr_fast_relu_dropout_backward_cpu(const detr_fast_relu_dropout* in, const detr_fast_rows* y, void* grad_x,
                                         int threads) {
    detr_fast::for_rows(*in, threads,
                        [&](int64_t first, int64_t end) { detr_fast::run_backward(*in, *y, grad_x, first, end); });
}
