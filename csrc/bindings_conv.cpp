// The part of the module detr_fast._C that is convolution's, and the peak that benchmarks measure it against.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/conv.h"
#include "cpu/conv_blocks.h"
#include "cpu/conv_max_pool.h"
#include "cpu/huge_pages.h"
#include "cpu/multiply_and_add.h"
#include "cpu/winograd.h"

namespace py = pybind11;

namespace {

using Sizes = std::array<int64_t, 12>;  // in the order of detr_fast_conv

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

detr_fast_conv shape_of(const Sizes& s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]};
}

int64_t conv_packed_floats(const Sizes& sizes) {
    const auto shape = shape_of(sizes);
    return detr_fast_conv_packed_floats(&shape);
}

void conv_pack(const Sizes& sizes, uintptr_t weight, uintptr_t scale, bool adjoint, uintptr_t packed, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    const detr_fast_conv_weight from{at<const float>(weight), at<const float>(scale), adjoint};
    detr_fast_conv_pack(&shape, &from, at<float>(packed), threads);
}

void conv_cpu(const Sizes& sizes, uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, uintptr_t gate,
              bool relu, uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_conv_cpu(&shape, at<const float>(x), at<const float>(packed), at<const float>(bias),
                       at<const float>(residual), at<const float>(gate), relu, at<float>(out), threads);
}

void conv_max_pool_cpu(const Sizes& sizes, uintptr_t x, const std::array<int64_t, 4>& strides, uintptr_t packed,
                       uintptr_t bias, uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_conv_max_pool_cpu(&shape, at<const float>(x), strides.data(), at<const float>(packed),
                                at<const float>(bias), at<float>(out), threads);
}

void winograd_cpu(const Sizes& sizes, uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, uintptr_t gate,
                  bool relu, uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_winograd_cpu(&shape, at<const float>(x), at<const float>(packed), at<const float>(bias),
                           at<const float>(residual), at<const float>(gate), relu, at<float>(out), threads);
}

bool winograd_is_faster(const Sizes& sizes) {
    const auto shape = shape_of(sizes);
    return detr_fast_winograd_is_faster(&shape);
}

void winograd_weight_gradient_cpu(const Sizes& sizes, uintptr_t x, uintptr_t grad, uintptr_t scale, uintptr_t of_weight,
                                  int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_winograd_weight_gradient_cpu(&shape, at<const float>(x), at<const float>(grad), at<const float>(scale),
                                           at<float>(of_weight), threads);
}

// Residual blocks as they lie in memory, for maps of any size. Whoever makes it keeps weights and biases.
class ConvBlocks {
  public:
    using Conv = std::tuple<std::array<int64_t, 7>, uintptr_t, uintptr_t>;  // numbers in the struct's order, addresses
    using Block = std::pair<std::vector<Conv>, std::optional<Conv>>;

    explicit ConvBlocks(const std::vector<Block>& blocks) : kept_(blocks.size()), blocks_(blocks.size()) {
        for (size_t i = 0; i < blocks.size(); ++i) {
            const auto& [convs, shortcut] = blocks[i];
            for (const Conv& conv : convs) kept_[i].push_back(conv_of(conv));
            if (shortcut) kept_[i].push_back(conv_of(*shortcut));
            const detr_fast_packed_conv* const first = kept_[i].data();
            const auto count = static_cast<int64_t>(convs.size());
            blocks_[i] = {first, count, shortcut ? first + count : nullptr};
        }
    }

    int64_t floats(const std::array<int64_t, 3>& map) const {
        const detr_fast_conv_blocks blocks = all();
        const detr_fast_map of_x = map_of(map);
        return detr_fast_conv_blocks_floats(&blocks, &of_x);
    }

    void run(const std::array<int64_t, 3>& map, uintptr_t x, uintptr_t memory, uintptr_t out, int threads) const {
        const py::gil_scoped_release release;
        const detr_fast_conv_blocks blocks = all();
        const detr_fast_map of_x = map_of(map);
        detr_fast_conv_blocks_cpu(&blocks, &of_x, at<const float>(x), at<float>(memory), at<float>(out), threads);
    }

  private:
    static detr_fast_packed_conv conv_of(const Conv& conv) {
        const auto& [n, packed, bias] = conv;
        return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], at<const float>(packed), at<const float>(bias)};
    }
    static detr_fast_map map_of(const std::array<int64_t, 3>& map) { return {map[0], map[1], map[2]}; }
    detr_fast_conv_blocks all() const { return {blocks_.data(), static_cast<int64_t>(blocks_.size())}; }

    std::vector<std::vector<detr_fast_packed_conv>> kept_;
    std::vector<detr_fast_conv_block> blocks_;
};

}  // namespace

void bind_conv(py::module_& m) {
    m.def("conv_packed_floats", &conv_packed_floats);
    m.def("conv_pack", &conv_pack);
    m.def("conv_cpu", &conv_cpu);
    py::class_<ConvBlocks>(m, "ConvBlocks")
        .def(py::init<const std::vector<ConvBlocks::Block>&>())
        .def("floats", &ConvBlocks::floats)
        .def("run", &ConvBlocks::run);
    m.def("conv_max_pool_cpu", &conv_max_pool_cpu);
    m.def("use_huge_pages", [](uintptr_t memory, size_t bytes) { detr_fast::use_huge_pages(at<void>(memory), bytes); });
    m.def("multiply_and_add_cpu", &detr_fast_multiply_and_add_cpu, py::call_guard<py::gil_scoped_release>());
    m.def("winograd_cpu", &winograd_cpu);
    m.def("winograd_is_faster", &winograd_is_faster);
    m.def("winograd_weight_gradient_cpu", &winograd_weight_gradient_cpu);
}
