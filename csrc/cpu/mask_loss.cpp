// Both losses and their gradients in one pass over the pixels of the frame, which are made a row at a time and never
// stored: the gradient of an upsampled value goes straight to the logits that it was made of.

#include "mask_loss.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "solver.h"
#include "thread_pool.h"
#include "vectors.h"
#include "widths.h"

namespace detr_fast {
namespace {

constexpr float alpha = 0.25f;  // Lin et al. 2017; gamma is 2
// Gradients that are gathered for each logit: of the focal loss; of the sum of probabilities; of the sum of those
// inside the target. The dice loss is a ratio of sums, so that its gradient is known only in the end.
constexpr int num_fields = 3;

// Where a row or column of the frame lies among those of the logits: (1 - share) of `first` and `share` of the next.
struct Axis {
    std::vector<int32_t> first;
    std::vector<float> share;
    std::vector<int32_t> start;  // [from + 1]: the first place whose `first` is not below an index

    Axis(int64_t from, int64_t to) : first(to), share(to), start(from + 1, static_cast<int32_t>(to)) {
        const double scale = static_cast<double>(from) / static_cast<double>(to);
        for (int64_t i = to - 1; i >= 0; --i) {
            const double place = std::max((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
            const int64_t below = std::min(static_cast<int64_t>(place), from - 1);
            first[i] = static_cast<int32_t>(below);
            // Past the last one there is nothing to blend with.
            share[i] = below == from - 1 ? 0.0f : static_cast<float>(place - static_cast<double>(below));
            start[below] = static_cast<int32_t>(i);
        }
        for (int64_t j = from - 1; j >= 0; --j) start[j] = std::min(start[j], start[j + 1]);
        start[0] = 0;
    }
};

template <typename Number>
struct Sums {
    Number focal{}, p{}, p_inside{};
};

template <bool with_gradients, typename Number>
DETR_FAST_INLINE void add_pixels(Number x, Number inside, Sums<Number>& sums, Number* gradients) {
    const Number z = inside > 0.0f ? -x : x;  // positive where the prediction is wrong
    const Number e = exp_of_nonpositive(z < 0.0f ? z : -z);
    const Number r = 1.0f / (e + 1.0f);
    const Number er = e * r;
    const Number wrong = z < 0.0f ? er : r;
    const Number right = z < 0.0f ? r : er;
    const Number cross_entropy = log_of_one_plus(e) + (z < 0.0f ? Number{} : z);
    const Number weighted = wrong * wrong * (inside * (2 * alpha - 1) + (1 - alpha));
    const Number p = inside > 0.0f ? right : wrong;
    sums.focal += weighted * cross_entropy;
    sums.p += p;
    sums.p_inside += p * inside;
    if (!with_gradients) return;
    const Number slope = weighted * (right * cross_entropy * 2.0f + wrong);
    gradients[0] = inside > 0.0f ? -slope : slope;
    gradients[1] = wrong * right;
    gradients[2] = gradients[1] * inside;
}

template <typename Number>
DETR_FAST_INLINE float total(Number x) {
    if constexpr (std::is_arithmetic_v<Number>) {
        return x;
    } else {
        return reduce(x, Add{});
    }
}

template <typename Number>
DETR_FAST_INLINE Number read(const float* from) {
    Number x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <typename Number>
DETR_FAST_INLINE void add_to(float* to, Number x) {
    x += read<Number>(to);
    std::memcpy(to, &x, sizeof(x));
}

struct Totals {
    double focal = 0, p = 0, p_inside = 0, inside = 0;

    template <typename Number>
    DETR_FAST_INLINE void add(const Sums<Number>& sums) {
        focal += total(sums.focal);
        p += total(sums.p);
        p_inside += total(sums.p_inside);
    }
};

// One mask: memory for a row of the frame, and gradients of the two rows of logits that it is made of.
template <bool with_gradients, int Bytes>
class MaskPass {
  public:
    MaskPass(const detr_fast_mask_loss& in, const Axis& rows, const Axis& columns, float* memory)
        : in_(in), rows_(rows), columns_(columns), frame_width_(in.frame_width) {
        blended_ = memory;
        upsampled_ = blended_ + in.width + 1;
        inside_ = upsampled_ + frame_width_;
        above_ = inside_ + frame_width_;
        below_ = above_ + num_fields * frame_width_;
        fields_[2] = below_ + num_fields * frame_width_;
    }

    void run(int64_t n, const detr_fast_mask_losses& out) {
        const int64_t size = in_.height * in_.width;
        totals_ = Totals{};
        if (with_gradients) {
            fields_[0] = out.grad_mask + n * size;
            fields_[1] = out.grad_dice + n * size;
            for (float* field : fields_) std::fill_n(field, size, 0.0f);
            std::fill_n(above_, 2 * num_fields * frame_width_, 0.0f);
        }
        const float* logits = in_.logits + n * size;
        const int64_t last = in_.height - 1;
        int64_t current = 0;
        for (int64_t y = 0; y < in_.frame_height; ++y) {
            const int64_t first = rows_.first[y];
            if (with_gradients && first != current) {
                leave(current, first);
                current = first;
            }
            blend(logits + first * in_.width, logits + std::min(first + 1, last) * in_.width, rows_.share[y]);
            upsample();
            read_target(in_.targets[n], y);
            add_row(rows_.share[y]);
        }
        if (with_gradients) leave(current, in_.height + 1);
        finish(n, out);
    }

  private:
    void blend(const float* __restrict__ first, const float* __restrict__ next, float share) {
        for (int64_t x = 0; x < in_.width; ++x) blended_[x] = first[x] * (1.0f - share) + next[x] * share;
        blended_[in_.width] = blended_[in_.width - 1];
    }

    void upsample() {
        const int32_t* __restrict__ first = columns_.first.data();
        const float* __restrict__ share = columns_.share.data();
        float* __restrict__ to = upsampled_;
        for (int64_t x = 0; x < frame_width_; ++x) {
            to[x] = blended_[first[x]] * (1.0f - share[x]) + blended_[first[x] + 1] * share[x];
        }
    }

    void read_target(const detr_fast_target_mask& target, int64_t y) {
        const int64_t width = y < target.height ? target.width : 0;
        const uint8_t* __restrict__ row = target.pixels + y * target.width;
        float* __restrict__ to = inside_;
        int64_t count = 0;
        for (int64_t x = 0; x < width; ++x) {
            to[x] = row[x];
            count += row[x];
        }
        std::fill(inside_ + width, inside_ + frame_width_, 0.0f);
        totals_.inside += static_cast<double>(count);
    }

    void add_row(float share) {
        int64_t x = 0;
#if defined(DETR_FAST_HAS_VECTORS)
        x = add_span<Vector<float, Bytes>>(x, Bytes / sizeof(float), share);
#endif
        add_span<float>(x, 1, share);
    }

    template <typename Number>
    DETR_FAST_INLINE int64_t add_span(int64_t x, int64_t step, float share) {
        Sums<Number> sums;
        for (; x + step <= frame_width_; x += step) {
            Number gradients[num_fields];
            add_pixels<with_gradients>(read<Number>(upsampled_ + x), read<Number>(inside_ + x), sums, gradients);
            for (int f = 0; with_gradients && f < num_fields; ++f) {
                add_to(above_ + f * frame_width_ + x, gradients[f] * (1.0f - share));
                add_to(below_ + f * frame_width_ + x, gradients[f] * share);
            }
        }
        totals_.add(sums);
        return x;
    }

    // The frame's rows go on between other rows of logits: what belongs to those behind is handed to them.
    void leave(int64_t current, int64_t next) {
        hand_over(above_, current);
        std::fill_n(above_, num_fields * frame_width_, 0.0f);
        if (next == current + 1) {
            std::swap(above_, below_);
        } else if (current + 1 < in_.height) {
            hand_over(below_, current + 1);
            std::fill_n(below_, num_fields * frame_width_, 0.0f);
        }
    }

    void hand_over(const float* gradients, int64_t row) {
        for (int f = 0; f < num_fields; ++f) {
            const float* from = gradients + f * frame_width_;
            float* to = fields_[f] + row * in_.width;
            float from_before = 0;
            for (int64_t j = 0; j < in_.width; ++j) {
                float here = from_before, next = 0;
                for (int32_t x = columns_.start[j]; x < columns_.start[j + 1]; ++x) {
                    here += from[x] * (1.0f - columns_.share[x]);
                    next += from[x] * columns_.share[x];
                }
                to[j] += here;
                from_before = next;
            }
        }
    }

    void finish(int64_t n, const detr_fast_mask_losses& out) {
        const double pixels = static_cast<double>(in_.frame_height) * static_cast<double>(frame_width_);
        const double numerator = 2 * totals_.p_inside + 1;
        const double denominator = totals_.p + totals_.inside + 1;
        out.mask[n] = static_cast<float>(totals_.focal / pixels);
        out.dice[n] = static_cast<float>(1 - numerator / denominator);
        if (!with_gradients) return;
        const auto per_pixel = static_cast<float>(1 / pixels);
        const auto of_p = static_cast<float>(numerator / (denominator * denominator));
        const auto of_p_inside = static_cast<float>(-2 / denominator);
        for (int64_t i = 0; i < in_.height * in_.width; ++i) {
            fields_[0][i] *= per_pixel;
            fields_[1][i] = fields_[1][i] * of_p + fields_[2][i] * of_p_inside;
        }
    }

    const detr_fast_mask_loss& in_;
    const Axis& rows_;
    const Axis& columns_;
    const int64_t frame_width_;
    float *blended_, *upsampled_, *inside_;
    float *above_, *below_;      // [num_fields, W] each
    float* fields_[num_fields];  // [h, w] each; the first two lie where the gradients go
    Totals totals_;
};

// Numbers that a MaskPass keeps.
int64_t memory_of(const detr_fast_mask_loss& in) {
    return in.width + 1 + (2 + 2 * num_fields) * in.frame_width + in.height * in.width;
}

struct MaskTask {
    const detr_fast_mask_loss& in;
    const Axis& rows;
    const Axis& columns;
    int64_t mask;
    float* memory;
    const detr_fast_mask_losses& out;

    template <int Bytes>
    void run() const {
        if (out.grad_mask == nullptr) {
            MaskPass<false, Bytes>(in, rows, columns, memory).run(mask, out);
        } else {
            MaskPass<true, Bytes>(in, rows, columns, memory).run(mask, out);
        }
    }
};

}  // namespace
}  // namespace detr_fast

void detr_fast_mask_loss_cpu(const detr_fast_mask_loss* in, const detr_fast_mask_losses* out, int threads) {
    const detr_fast::Axis rows(in->height, in->frame_height);
    const detr_fast::Axis columns(in->width, in->frame_width);
    const auto bytes = static_cast<size_t>(detr_fast::memory_of(*in)) * sizeof(float);
    detr_fast::parallel_for(in->masks, threads, [&](int64_t n) {
        static thread_local detr_fast::Scratch scratch;
        auto* memory = reinterpret_cast<float*>(scratch.reserve(bytes));
        detr_fast::with_widest_vectors(detr_fast::MaskTask{*in, rows, columns, n, memory, *out});
        scratch.release_if_large();
    });
}
