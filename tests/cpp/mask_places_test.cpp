// csrc/cpu/mask_argmax.cpp and mask_threshold.cpp under sanitizers: frames larger and smaller than the masks, on
// several threads, in arrays that are no larger than they have to be. Exits with 0 where all is well.

#include "mask_threshold.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

struct Along {
    std::vector<int32_t> first;
    std::vector<float> share;

    Along(int64_t from, int64_t to) : first(to), share(to) {
        for (int64_t i = 0; i < to; ++i) {
            const double place = std::max((static_cast<double>(i) + 0.5) * from / to - 0.5, 0.0);
            first[i] = static_cast<int32_t>(std::min(static_cast<int64_t>(place), from - 1));
            share[i] = first[i] == from - 1 ? 0.0f : static_cast<float>(place - first[i]);
        }
    }

    detr_fast_places places() const { return {static_cast<int64_t>(first.size()), first.data(), share.data()}; }
};

// Pixel by pixel.
float value(const float* mask, int64_t height, int64_t width, const Along& rows, const Along& columns, int64_t y,
            int64_t x) {
    const int64_t i = rows.first[y], j = columns.first[x];
    const int64_t below = std::min(i + 1, height - 1), right = std::min(j + 1, width - 1);
    const float down = rows.share[y], along = columns.share[x];
    const float on_left = mask[i * width + j] * (1 - down) + mask[below * width + j] * down;
    const float on_right = mask[i * width + right] * (1 - down) + mask[below * width + right] * down;
    return on_left * (1 - along) + on_right * along;
}

void run(int64_t masks, int64_t height, int64_t width, int64_t frame_height, int64_t frame_width, int threads) {
    std::vector<float> logits(masks * height * width);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 37 % 23) / 8.0f - 1.3f;
    const Along rows(height, frame_height), columns(width, frame_width);
    const auto of_rows = rows.places(), of_columns = columns.places();
    const int64_t sizes[3] = {masks, height, width};
    std::vector<int64_t> index(frame_height * frame_width);
    std::vector<uint8_t> above(masks * frame_height * frame_width);
    detr_fast_mask_argmax_cpu(logits.data(), sizes, &of_rows, &of_columns, index.data(), threads);
    detr_fast_mask_threshold_cpu(logits.data(), sizes, &of_rows, &of_columns, 0.1f, above.data(), threads);
    for (int64_t y = 0; y < frame_height; ++y) {
        for (int64_t x = 0; x < frame_width; ++x) {
            const int64_t chosen = index[y * frame_width + x];
            require(chosen >= 0 && chosen < masks, "a mask is chosen");
            const auto of = [&](int64_t k) {
                return value(&logits[k * height * width], height, width, rows, columns, y, x);
            };
            for (int64_t k = 0; k < masks; ++k) {
                require(of(k) <= of(chosen) + 1e-5f, "the highest mask is chosen");
                const bool is_above = above[(k * frame_height + y) * frame_width + x] != 0;
                require(is_above == (of(k) > 0.1f) || std::abs(of(k) - 0.1f) < 1e-5f, "what is above the bound");
            }
        }
    }
}

}  // namespace

int main() {
    run(5, 7, 9, 28, 35, 3);
    run(1, 1, 1, 4, 3, 1);
    run(3, 9, 30, 4, 7, 2);
    run(2, 1, 8, 1, 40, 4);
    run(9, 5, 6, 37, 33, 3);
    return 0;
}
