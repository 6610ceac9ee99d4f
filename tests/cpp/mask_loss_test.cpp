// csrc/cpu/mask_loss.cpp under sanitizers: frames larger and smaller than the logits, masks smaller than the frame, on
// several threads, in arrays that are no larger than they have to be. Exits with 0 where all is well.

#include "mask_loss.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// Checks the gradient of the focal loss against a difference quotient, at one logit of each mask.
void run(int64_t masks, int64_t height, int64_t width, int64_t frame_height, int64_t frame_width, int threads) {
    std::vector<float> logits(masks * height * width);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 37 % 23) / 8.0f - 1.0f;
    std::vector<std::vector<uint8_t>> pixels;
    std::vector<detr_fast_target_mask> targets;
    for (int64_t n = 0; n < masks; ++n) {
        const int64_t h = frame_height - n % 2 * (frame_height / 2);
        pixels.emplace_back(h * frame_width);
        for (size_t i = 0; i < pixels.back().size(); ++i) pixels.back()[i] = i * 13 % 5 < 2;
        targets.push_back({pixels.back().data(), h, frame_width});
    }
    const detr_fast_mask_loss in{masks, height, width, frame_height, frame_width, logits.data(), targets.data()};
    std::vector<float> mask(masks), dice(masks), grad_mask(logits.size()), grad_dice(logits.size());
    const detr_fast_mask_losses out{mask.data(), dice.data(), grad_mask.data(), grad_dice.data()};
    detr_fast_mask_loss_cpu(&in, &out, threads);

    std::vector<float> moved(masks), unused(masks);
    const detr_fast_mask_losses losses_alone{moved.data(), unused.data(), nullptr, nullptr};
    const float step = 1.0f / 64;
    for (int64_t n = 0; n < masks; ++n) logits[n * height * width] += step;
    detr_fast_mask_loss_cpu(&in, &losses_alone, threads);
    for (int64_t n = 0; n < masks; ++n) {
        const float quotient = (moved[n] - mask[n]) / step;
        require(std::abs(quotient - grad_mask[n * height * width]) < 0.02f, "gradient is the difference quotient");
        require(dice[n] > 0 && dice[n] < 1, "dice in (0, 1)");
    }
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 3; threads += 2) {
        run(5, 7, 9, 28, 35, threads);
        run(2, 1, 1, 3, 5, threads);
        run(3, 9, 40, 4, 7, threads);
        run(1, 6, 5, 6, 5, threads);
        run(0, 6, 5, 6, 5, threads);
    }
    std::puts("ok");
    return 0;
}
