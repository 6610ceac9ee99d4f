// The focal and the dice loss of masks on the CPU. See detr_fast/ops/mask_loss/api.py for what it computes.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

struct detr_fast_target_mask {
    const uint8_t* pixels;  // [height, width], contiguous, 0 or 1
    int64_t height, width;  // at most the frame's
};

struct detr_fast_mask_loss {
    int64_t masks, height, width;                 // N, h, w
    int64_t frame_height, frame_width;            // H, W, which the logits are upsampled to
    const float* logits;                          // [N, h, w], contiguous
    const struct detr_fast_target_mask* targets;  // [N]
};

struct detr_fast_mask_losses {
    float *mask, *dice;            // [N]
    float *grad_mask, *grad_dice;  // [N, h, w], contiguous: of each mask's own loss; or null, both
};

// Throws std::bad_alloc. The results do not depend on the number of threads.
void detr_fast_mask_loss_cpu(const struct detr_fast_mask_loss* in, const struct detr_fast_mask_losses* out,
                             int threads);

#if defined(__cplusplus)
}
#endif
