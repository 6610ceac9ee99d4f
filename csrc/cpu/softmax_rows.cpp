#include "softmax_rows.h"

#include <algorithm>
#include <limits>

#include "vectors.h"
#include "widths.h"

namespace detr_fast {
namespace {

template <int, typename Real>
void fill(const ImageLayer<Real>& image, const SoftmaxRows<Real>& rows) {
    for (int64_t q = 0; q < image.queries; ++q) {
        const Real* __restrict__ logits = image.logits + q * image.logit_stride;
        Real* kept = rows.exponentials == nullptr ? nullptr : rows.exponentials + q * image.classes;
        Real highest = logits[0];
        for (int64_t c = 1; c < image.classes; ++c) highest = logits[c] > highest ? logits[c] : highest;
        Real sum = 0;
        for (int64_t c = 0; c < image.classes; ++c) {
            const Real e = exp_of_nonpositive(logits[c] - highest);
            sum += e;
            if (kept != nullptr) kept[c] = e;
        }
        rows.highest[q] = highest;
        rows.sum[q] = sum;
    }
}

#if defined(DETR_FAST_HAS_VECTORS)
// Of `queries` rows at once, which keeps the units busy while a row's maximum or sum is gathered from the lanes. Logits
// that are not of the row stand as -inf, which adds e^-87.
template <int Bytes, int queries>
DETR_FAST_INLINE void fill_rows(const float* logits, int64_t stride, const RowEnd<Bytes>& end, float* highest_logit,
                                float* sum_of_exponentials, float* kept, int64_t kept_stride) {
    using Floats = Vector<float, Bytes>;
    constexpr int64_t width = RowEnd<Bytes>::width;
    constexpr Higher higher;
    constexpr Add add;
    const Floats nothing = Floats{} - std::numeric_limits<float>::infinity();
    Floats last[queries], highest[queries], sum[queries];
    for (int r = 0; r < queries; ++r) {
        const auto read = load<Floats>(logits + r * stride + end.start);
        highest[r] = last[r] = end.unseen ? read : nothing;
    }
    for (int64_t c = 0; c < end.whole; c += width) {
        for (int r = 0; r < queries; ++r) highest[r] = higher(load<Floats>(logits + r * stride + c), highest[r]);
    }
    for (int r = 0; r < queries; ++r) {
        highest_logit[r] = reduce(highest[r], higher);
        sum[r] = exp_of_nonpositive(last[r] - highest_logit[r]);
        if (kept != nullptr) store(kept + r * kept_stride + end.start, sum[r]);  // seen lanes are overwritten below
    }
    for (int64_t c = 0; c < end.whole; c += width) {
        for (int r = 0; r < queries; ++r) {
            const Floats e = exp_of_nonpositive(load<Floats>(logits + r * stride + c) - highest_logit[r]);
            sum[r] += e;
            if (kept != nullptr) store(kept + r * kept_stride + c, e);
        }
    }
    for (int r = 0; r < queries; ++r) sum_of_exponentials[r] = reduce(sum[r], add);
}

template <int Bytes>
void fill_short_rows(const ImageLayer<float>& image, const SoftmaxRows<float>& rows) {
    constexpr int64_t width = RowEnd<Bytes>::width;
    const RowEnd<Bytes> end(width);
    float filled[width], exponentials[width];
    std::fill_n(filled, width, -std::numeric_limits<float>::infinity());
    for (int64_t q = 0; q < image.queries; ++q) {
        std::copy_n(image.logits + q * image.logit_stride, image.classes, filled);
        fill_rows<Bytes, 1>(filled, 0, end, rows.highest + q, rows.sum + q, exponentials, 0);
        if (rows.exponentials == nullptr) continue;
        std::copy_n(exponentials, image.classes, rows.exponentials + q * image.classes);
    }
}

template <int Bytes>
void fill(const ImageLayer<float>& image, const SoftmaxRows<float>& rows) {
    if (image.classes < RowEnd<Bytes>::width) return fill_short_rows<Bytes>(image, rows);
    const RowEnd<Bytes> end(image.classes);
    const auto fill_from = [&](auto count, int64_t q) {
        float* kept = rows.exponentials == nullptr ? nullptr : rows.exponentials + q * image.classes;
        fill_rows<Bytes, count>(image.logits + q * image.logit_stride, image.logit_stride, end, rows.highest + q,
                                rows.sum + q, kept, image.classes);
    };
    int64_t q = 0;
    for (; q + 2 <= image.queries; q += 2) fill_from(std::integral_constant<int, 2>{}, q);
    if (q < image.queries) fill_from(std::integral_constant<int, 1>{}, q);
}
#endif

template <typename Real>
struct Fill {
    const ImageLayer<Real>& image;
    const SoftmaxRows<Real>& rows;

    template <int Bytes>
    void run() const {
        fill<Bytes>(image, rows);
    }
};

}  // namespace

void fill_softmax_rows(const ImageLayer<float>& image, const SoftmaxRows<float>& rows) {
    with_widest_vectors(Fill<float>{image, rows});
}

void fill_softmax_rows(const ImageLayer<double>& image, const SoftmaxRows<double>& rows) {
    with_widest_vectors(Fill<double>{image, rows});
}

}  // namespace detr_fast
