// The part of the module detr_fast._C that is a transformer's layers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/transformer_layers.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Lengths = std::vector<int64_t>;
using Sizes = std::array<int64_t, 4>;  // width, inner, heads, queries
using Pair = std::array<uintptr_t, 2>;

// Addresses in the order of Layer's members.
template <typename Layer>
using Addresses = std::array<uintptr_t, sizeof(Layer) / sizeof(uintptr_t)>;

detr_fast_weights weights_at(const uintptr_t* addresses) {
    return {at<const float>(addresses[0]), at<const float>(addresses[1])};
}

std::vector<detr_fast_encoder_layer> encoder_of(const std::vector<Addresses<detr_fast_encoder_layer>>& layers) {
    std::vector<detr_fast_encoder_layer> all;
    for (const auto& a : layers) {
        const auto part = [&](size_t i) { return weights_at(a.data() + 2 * i); };
        all.push_back({part(0), part(1), part(2), part(3), part(4), part(5), part(6)});
    }
    return all;
}

// Keys and values of the memory stand last.
std::vector<detr_fast_decoder_layer> decoder_of(const std::vector<Addresses<detr_fast_decoder_layer>>& layers) {
    std::vector<detr_fast_decoder_layer> all;
    for (const auto& a : layers) {
        const auto part = [&](size_t i) { return weights_at(a.data() + 2 * i); };
        all.push_back({part(0), part(1), part(2), part(3), part(4), part(5), part(6), part(7), part(8), part(9),
                       part(10), part(11)});
    }
    return all;
}

detr_fast_transformer_sizes sizes_of(const Lengths& lengths, const Sizes& sizes, double eps, int threads,
                                     size_t layers) {
    return {static_cast<int64_t>(layers),         sizes[0],       sizes[1], sizes[2], eps,
            static_cast<int64_t>(lengths.size()), lengths.data(), threads};
}

void encoder_layers_cpu(const Lengths& lengths, const Sizes& sizes, double eps, int threads,
                        const std::vector<Addresses<detr_fast_encoder_layer>>& layers, uintptr_t x, uintptr_t pos,
                        uintptr_t y, uintptr_t y_pos) {
    const py::gil_scoped_release release;
    const auto all = encoder_of(layers);
    const auto of = sizes_of(lengths, sizes, eps, threads, layers.size());
    detr_fast_encoder_layers_cpu(&of, all.data(), at<const float>(x), at<const float>(pos), at<float>(y),
                                 at<float>(y_pos));
}

void decoder_layers_cpu(const Lengths& lengths, const Sizes& sizes, double eps, int threads,
                        const std::vector<Addresses<detr_fast_decoder_layer>>& layers, uintptr_t memory,
                        uintptr_t memory_pos, uintptr_t query_pos, const Pair& norm, bool last_alone, uintptr_t hs) {
    const py::gil_scoped_release release;
    const auto all = decoder_of(layers);
    const auto of = sizes_of(lengths, sizes, eps, threads, layers.size());
    const detr_fast_decoder_inputs inputs{at<const float>(memory),    at<const float>(memory_pos),
                                          at<const float>(query_pos), sizes[3],
                                          weights_at(norm.data()),    last_alone};
    detr_fast_decoder_layers_cpu(&of, all.data(), &inputs, at<float>(hs));
}

}  // namespace

void bind_transformer_layers(py::module_& m) {
    m.def("encoder_layers_cpu", &encoder_layers_cpu);
    m.def("decoder_layers_cpu", &decoder_layers_cpu);
}
