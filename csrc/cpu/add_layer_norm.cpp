#include "add_layer_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dropout.h"
#include "rows.h"
#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

using Inputs = detr_fast_add_layer_norm;
using Outputs = detr_fast_add_layer_norm_outputs;
using Gradients = detr_fast_add_layer_norm_gradients;

// Arrays of one number for each column, which a thread keeps.
template <typename Real>
struct Row {
    Real* sum;         // residual + dropped x, then normalized
    Real* other;       // what is read or written beside it
    uint16_t* random;  // of the dropout

    explicit Row(int64_t columns) {
        static thread_local Scratch memory;
        const int64_t padded =
            (columns + dropout_columns_at_once - 1) / dropout_columns_at_once * dropout_columns_at_once;
        sum = reinterpret_cast<Real*>(memory.reserve(static_cast<size_t>(padded) * (2 * sizeof(Real) + 2)));
        other = sum + padded;
        random = reinterpret_cast<uint16_t*>(other + padded);
    }
};

// Drops what the random numbers say, scales what is left.
template <typename Real>
inline void drop(const Inputs& in, const uint16_t* __restrict__ random, Real* __restrict__ values) {
    const auto scale = static_cast<Real>(in.scale);
    const auto threshold = static_cast<int32_t>(in.threshold);
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t c = 0; c < in.columns; ++c) values[c] = random[c] < threshold ? Real(0) : values[c] * scale;
}

// row.sum = residual + dropout(x) of row i; returns its sum over columns.
template <typename Real>
inline Real add(const Inputs& in, int64_t i, const Row<Real>& row) {
    read_row(in.x, i, in.columns, row.sum);
    if (in.seed != nullptr) {
        fill_random(static_cast<uint64_t>(*in.seed), 0, 0, static_cast<uint32_t>(i), 0, in.columns, row.random);
        drop(in, row.random, row.sum);
    }
    return add_row(in.residual, i, in.columns, row.sum);
}

// The mean is subtracted before squares are summed: their sum less that of the mean would lose the digits that a mean
// far from 0 has in common with all.
template <typename Real>
inline void forward_row(const Inputs& in, const Outputs& out, int64_t i, const Row<Real>& row) {
    const auto columns = static_cast<Real>(in.columns);
    const Real mean = add(in, i, row) / columns;
    Real* __restrict__ sum = row.sum;
    Real squares = 0;
    DETR_FAST_PRAGMA(omp simd reduction(+ : squares))
    for (int64_t c = 0; c < in.columns; ++c) {
        sum[c] -= mean;
        squares += sum[c] * sum[c];
    }
    const Real rstd = Real(1) / std::sqrt(squares / columns + static_cast<Real>(out.eps));
    const Real* __restrict__ weight = static_cast<const Real*>(in.weight);
    const Real* __restrict__ bias = static_cast<const Real*>(out.bias);
    const auto result = [=](int64_t c) { return sum[c] * rstd * weight[c] + bias[c]; };
    write_row(out.y, out.y_dtype, i, in.columns, result);
    if (out.pos_rows > 0) {
        read_row(out.pos, i % out.pos_rows, in.columns, row.other);
        const Real* __restrict__ pos = row.other;
        write_row(out.y_pos, out.y_dtype, i, in.columns, [=](int64_t c) { return result(c) + pos[c]; });
    }
    if (out.mean != nullptr) {
        static_cast<Real*>(out.mean)[i] = mean;
        static_cast<Real*>(out.rstd)[i] = rstd;
    }
}

// With g = dy * weight and n the normalized row: dsum = (g - mean(g) - n mean(g n)) rstd.
template <typename Real>
inline void backward_row(const Inputs& in, const Gradients& gradients, int64_t i, const Row<Real>& row,
                         Real* __restrict__ grad_weight, Real* __restrict__ grad_bias) {
    add(in, i, row);
    Real* __restrict__ normal = row.sum;
    Real* __restrict__ incoming = row.other;
    if (gradients.y.address != nullptr) {
        read_row(gradients.y, i, in.columns, incoming);
        if (gradients.y_pos.address != nullptr) add_row(gradients.y_pos, i, in.columns, incoming);
    } else {
        read_row(gradients.y_pos, i, in.columns, incoming);
    }
    const Real mean = static_cast<const Real*>(gradients.mean)[i];
    const Real rstd = static_cast<const Real*>(gradients.rstd)[i];
    const Real* __restrict__ weight = static_cast<const Real*>(in.weight);
    Real along_ones = 0;
    Real along_normal = 0;
    DETR_FAST_PRAGMA(omp simd reduction(+ : along_ones, along_normal))
    for (int64_t c = 0; c < in.columns; ++c) {
        normal[c] = (normal[c] - mean) * rstd;
        grad_weight[c] += incoming[c] * normal[c];
        grad_bias[c] += incoming[c];
        incoming[c] *= weight[c];
        along_ones += incoming[c];
        along_normal += incoming[c] * normal[c];
    }
    along_ones /= static_cast<Real>(in.columns);
    along_normal /= static_cast<Real>(in.columns);
    DETR_FAST_PRAGMA(omp simd)
    for (int64_t c = 0; c < in.columns; ++c) incoming[c] = (incoming[c] - along_ones - normal[c] * along_normal) * rstd;
    const auto result = [=](int64_t c) { return incoming[c]; };
    write_row(gradients.residual, in.residual.dtype, i, in.columns, result);
    if (gradients.x == nullptr) return;
    if (in.seed != nullptr) drop(in, row.random, incoming);
    write_row(gradients.x, in.x.dtype, i, in.columns, result);
}

template <typename Real>
inline void forward_rows(const Inputs& in, const Outputs& out, int64_t first, int64_t end) {
    const Row<Real> row(in.columns);
    for (int64_t i = first; i < end; ++i) forward_row(in, out, i, row);
}

template <typename Real>
inline void backward_rows(const Inputs& in, const Gradients& gradients, int64_t first, int64_t end, Real* partial) {
    const Row<Real> row(in.columns);
    std::fill_n(partial, 2 * in.columns, Real(0));
    for (int64_t i = first; i < end; ++i) backward_row(in, gradients, i, row, partial, partial + in.columns);
}

DETR_FAST_CLONES void run_forward(const Inputs& in, const Outputs& out, int64_t first, int64_t end) {
    if (in.is_double) return forward_rows<double>(in, out, first, end);
    forward_rows<float>(in, out, first, end);
}

DETR_FAST_CLONES void run_backward(const Inputs& in, const Gradients& gradients, int64_t first, int64_t end,
                                   void* partial) {
    if (in.is_double) return backward_rows(in, gradients, first, end, static_cast<double*>(partial));
    backward_rows(in, gradients, first, end, static_cast<float*>(partial));
}

// Elements that take as long as waking another thread, about 20 microseconds.
constexpr int64_t work_worth_a_thread = 1 << 15;
constexpr int64_t elements_per_task = 1 << 13;

int useful_threads(const Inputs& in, int threads) {
    return static_cast<int>(std::clamp<int64_t>(in.rows * in.columns / work_worth_a_thread, 1, threads));
}

int64_t rows_per_task(const Inputs& in) {
    return std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, in.columns));
}

// Adds up the blocks' sums [blocks, 2, D] in their order, whichever threads made them.
template <typename Real>
void sum_partials(const std::vector<unsigned char>& partials, int64_t blocks, int64_t columns, void* weight,
                  void* bias) {
    const auto* from = reinterpret_cast<const Real*>(partials.data());
    std::vector<double> sums(2 * columns, 0.0);
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t c = 0; c < 2 * columns; ++c) sums[c] += from[block * 2 * columns + c];
    }
    std::copy_n(sums.begin(), columns, static_cast<Real*>(weight));
    std::copy_n(sums.begin() + columns, columns, static_cast<Real*>(bias));
}

}  // namespace
}  // namespace detr_fast

void detr_fast_add_layer_norm_cpu(const detr_fast_add_layer_norm* in, const detr_fast_add_layer_norm_outputs* out,
                                  int threads) {
    using namespace detr_fast;
    const int64_t each = rows_per_task(*in);
    parallel_for((in->rows + each - 1) / each, useful_threads(*in, threads),
                 [&](int64_t task) { run_forward(*in, *out, task * each, std::min(in->rows, (task + 1) * each)); });
}

void detr_fast_add_layer_norm_backward_cpu(const detr_fast_add_layer_norm* in,
                                           const detr_fast_add_layer_norm_gradients* gradients, int threads) {
    using namespace detr_fast;
    const int64_t most_blocks = 64;
    const int64_t each = std::max(rows_per_task(*in), (in->rows + most_blocks - 1) / most_blocks);
    const int64_t blocks = (in->rows + each - 1) / each;
    const size_t block_bytes = static_cast<size_t>(2 * in->columns) * (in->is_double ? sizeof(double) : sizeof(float));
    std::vector<unsigned char> partials(blocks * block_bytes);
    const CallMemory use(partials.size());
    parallel_for(blocks, useful_threads(*in, threads), [&](int64_t block) {
        run_backward(*in, *gradients, block * each, std::min(in->rows, (block + 1) * each),
                     partials.data() + block * block_bytes);
    });
    const auto sum = in->is_double ? sum_partials<double> : sum_partials<float>;
    sum(partials, blocks, in->columns, gradients->weight, gradients->bias);
}
