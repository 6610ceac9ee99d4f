// The part of the module detr_fast._C that is attention's.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/attention.h"

namespace py = pybind11;

namespace {

using Counts = std::vector<int64_t>;
using Pair = std::array<int64_t, 2>;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Tokens = std::array<int64_t, 3>;  // address, and strides of tokens and heads

// Keyword arguments of Python become the launchers' struct; `seed` is an address, or 0 without dropout.
struct AttentionInputs {
    Tokens query, key, value;
    Counts query_lengths, key_lengths;
    Pair sizes;  // heads, head size
    double scale;
    uintptr_t seed;
    int64_t threshold;
    double dropout_scale;
    int threads;

    detr_fast_attention inputs() const {
        const auto tokens = [](const Tokens& t) {
            return detr_fast_tokens{at<const float>(static_cast<uintptr_t>(t[0])), t[1], t[2]};
        };
        return {tokens(query),
                tokens(key),
                tokens(value),
                query_lengths.data(),
                key_lengths.data(),
                static_cast<int64_t>(query_lengths.size()),
                sizes[0],
                sizes[1],
                static_cast<float>(scale),
                seed == 0 ? 0 : threshold,
                seed == 0 ? 0 : static_cast<uint64_t>(*at<const int64_t>(seed)),
                seed == 0 ? 1.0f : static_cast<float>(dropout_scale),
                threads};
    }
};

void attention_cpu(const AttentionInputs& a, uintptr_t output, uintptr_t log_sum) {
    const py::gil_scoped_release release;
    const auto inputs = a.inputs();
    detr_fast_attention_cpu(&inputs, at<float>(output), at<float>(log_sum));
}

// forward: output, its gradient, log_sum. gradients: of query, key and value.
void attention_backward_cpu(const AttentionInputs& a, const std::array<uintptr_t, 3>& forward,
                            const std::array<uintptr_t, 3>& gradients) {
    const py::gil_scoped_release release;
    const auto inputs = a.inputs();
    const detr_fast_attention_gradients to{at<const float>(forward[0]), at<const float>(forward[1]),
                                           at<const float>(forward[2]), at<float>(gradients[0]),
                                           at<float>(gradients[1]),     at<float>(gradients[2])};
    detr_fast_attention_backward_cpu(&inputs, &to);
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<AttentionInputs>(m, "AttentionInputs")
        .def(py::init([](const Tokens& query, const Tokens& key, const Tokens& value, Counts query_lengths,
                         Counts key_lengths, const Pair& sizes, double scale, uintptr_t seed, int64_t threshold,
                         double dropout_scale, int threads) {
            return AttentionInputs{
                query,     key,           value,  std::move(query_lengths), std::move(key_lengths), sizes, scale, seed,
                threshold, dropout_scale, threads};
        }));
    m.def("attention_cpu", &attention_cpu);
    m.def("attention_backward_cpu", &attention_backward_cpu);
}
