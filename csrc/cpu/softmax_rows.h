// The softmax over classes of an image's queries at a layer, as the matching cost and the cross-entropy need it.

#pragma once

#include <cstdint>

#include "image_layers.h"
#include "solver.h"

namespace detr_fast {

template <typename Real>
struct SoftmaxRows {
    Real* highest;       // [Q], the highest logit
    Real* sum;           // [Q], of e^(logit - highest)
    Real* exponentials;  // [Q, classes] these, or null where they are not to be kept

    // In memory of the calling thread, until it asks again.
    static SoftmaxRows of_thread(int64_t queries, Real* exponentials) {
        static thread_local Scratch memory;
        auto* highest = reinterpret_cast<Real*>(memory.reserve(2 * static_cast<size_t>(queries) * sizeof(Real)));
        return {highest, highest + queries, exponentials};
    }
};

void fill_softmax_rows(const ImageLayer<float>& image, const SoftmaxRows<float>& rows);
void fill_softmax_rows(const ImageLayer<double>& image, const SoftmaxRows<double>& rows);

}  // namespace detr_fast
