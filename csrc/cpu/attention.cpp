#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "attention_tile.h"
#include "denormals.h"
#include "lanes.h"
#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

// Some queries of one image in one head, and what they look at.
struct Task {
    const float* query;
    const float* key;
    const float* value;
    float* output;
    float* log_sum;
    int64_t queries;
    int64_t keys;
    int64_t first_query;  // within the image
    int64_t head;
    int64_t image;
};

struct PackedKeys {  // [keys, E] each
    float* key;
    float* value;
};

// The passes over the keys of one block of queries.
template <int Bytes, int vectors>
class Forward {
  public:
    using Floats = typename Registers<Bytes>::Floats;
    static constexpr int64_t lanes = vectors * Registers<Bytes>::width;

    DETR_FAST_INLINE Forward(const detr_fast_attention& all, const Task& task, int64_t first, const PackedKeys& keys,
                             float* memory)
        : all_(all), task_(task), first_(first), count_(std::min(lanes, task.queries - first)), keys_(keys) {
        query_ = memory;
        output_ = query_ + all.head_size * lanes;
        tile_ = output_ + all.head_size * lanes;
        pack_transposed<Bytes>(task.query + first * all.query.token_stride, all.query.token_stride, count_,
                               all.head_size, lanes, sign_of_scale(all), query_);
        std::fill_n(output_, all.head_size * lanes, 0.0f);
        each_vector([&](auto v) DETR_FAST_LAMBDA {
            highest_[v] = Floats{} - std::numeric_limits<float>::infinity();
            offset_[v] = highest_[v];
            sum_[v] = Floats{};
        });
        drops_ = all.dropout_threshold > 0;
        kept_.start(all, task.image, task.head, task.first_query + first);
    }

    DETR_FAST_INLINE void run() {
        for (int64_t key = 0; key < task_.keys; key += tile_keys) take_keys(key, std::min(tile_keys, task_.keys - key));
        finish();
    }

  private:
    template <typename Visit>
    static DETR_FAST_INLINE void each_vector(const Visit& visit) {
        unrolled<vectors>(visit);
    }

    DETR_FAST_INLINE void take_keys(int64_t first, int64_t count) {
        const int64_t size = all_.head_size;
        Floats shrink[vectors];
        multiply<Bytes, vectors>(keys_.key + first * size, whole_blocks<Bytes>(count), size, 1, query_, lanes, size,
                                 [&](int64_t row, auto v, const Floats& score) DETR_FAST_LAMBDA {
                                     store_as(tile_ + row * lanes + v * Registers<Bytes>::width, score);
                                     highest_[v] = score > highest_[v] ? score : highest_[v];
                                 });
        each_vector([&](auto v) DETR_FAST_LAMBDA {
            const Floats offset = highest_[v] * factor_of_scores(all_);
            shrink[v] = exp2_of_nonpositive<Bytes>(offset_[v] - offset);
            offset_[v] = offset;
            sum_[v] *= shrink[v];
        });
        drops_ ? weigh<true>(first, count) : weigh<false>(first, count);
        multiply<Bytes, vectors>(keys_.value + first * size, size, 1, size, tile_, lanes, count,
                                 [&](int64_t row, auto v, const Floats& product) DETR_FAST_LAMBDA {
                                     float* place = output_ + row * lanes + v * Registers<Bytes>::width;
                                     store_as(place, load_as<Floats>(place) * shrink[v] + product);
                                 });
    }

    // Scores become weights, but for a common factor.
    template <bool drops>
    DETR_FAST_INLINE void weigh(int64_t first, int64_t count) {
        const float factor = factor_of_scores(all_);
        Floats added[vectors];
        each_vector([&](auto v) DETR_FAST_LAMBDA { added[v] = Floats{}; });
        for (int64_t row = 0; row < count; ++row) {
            if (drops && row % kept_.group_keys == 0) kept_.draw(first + row);
            each_vector([&](auto v) DETR_FAST_LAMBDA {
                float* place = tile_ + row * lanes + v * Registers<Bytes>::width;
                Floats weight = exp2_of_nonpositive<Bytes>(load_as<Floats>(place) * factor - offset_[v]);
                added[v] += weight;
                if (drops) weight = kept_.kept(first + row, v * Registers<Bytes>::width, weight);
                store_as(place, weight);
            });
        }
        each_vector([&](auto v) DETR_FAST_LAMBDA { sum_[v] += added[v]; });
    }

    DETR_FAST_INLINE void finish() {
        const int64_t size = all_.head_size, stride = all_.heads * size;
        float factor[lanes], sum[lanes], offset[lanes];
        each_vector([&](auto v) DETR_FAST_LAMBDA {
            store_as(factor + v * Registers<Bytes>::width, all_.dropout_scale / sum_[v]);
            store_as(sum + v * Registers<Bytes>::width, sum_[v]);
            store_as(offset + v * Registers<Bytes>::width, offset_[v]);
        });
        unpack_transposed<Bytes>(output_, factor, lanes, count_, size, task_.output + first_ * stride, stride);
        for (int64_t q = 0; q < count_; ++q) task_.log_sum[first_ + q] = offset[q] + std::log2(sum[q]);
    }

    const detr_fast_attention& all_;
    const Task& task_;
    int64_t first_, count_;
    bool drops_;
    const PackedKeys& keys_;
    float* query_;             // [E, lanes]
    float* output_;            // [E, lanes]
    float* tile_;              // [tile_keys, lanes]
    Floats highest_[vectors];  // score
    Floats offset_[vectors];   // the same times factor_of_scores
    Floats sum_[vectors];
    KeptWeights<Bytes, vectors> kept_;
};

template <int Bytes>
DETR_FAST_INLINE void forward(const detr_fast_attention& all, const Task& task, unsigned char* memory) {
    auto layout = Layout::at(memory);
    PackedKeys keys;
    float* scratch;
    for (float** array : {&keys.key, &keys.value}) layout.take(*array, whole_blocks<Bytes>(task.keys) * all.head_size);
    layout.take(scratch, 0);
    pack_keys<Bytes>(task.key, all.key.token_stride, task.keys, all.head_size, keys.key);
    pack_keys<Bytes>(task.value, all.value.token_stride, task.keys, all.head_size, keys.value);
    for (int64_t q = 0; q < task.queries;) {
        const bool two = takes_two<Bytes>(task.queries - q);
        if (two) Forward<Bytes, 2>(all, task, q, keys, scratch).run();
        if (!two) Forward<Bytes, 3>(all, task, q, keys, scratch).run();
        q += (two ? 2 : 3) * Registers<Bytes>::width;
    }
}

struct ForwardTask {
    const detr_fast_attention& all;
    const Task& task;
    unsigned char* memory;

    template <int Bytes>
    bool run() const {
        forward<Bytes>(all, task, memory);
        return true;
    }
};

// A task packs its keys for itself, which costs as much as 4 of its queries: at most 288 queries, or fewer where that
// leaves threads without work. Results are the same however queries are divided.
int64_t queries_per_task(const detr_fast_attention& all, int64_t queries) {
    const int64_t wanted = (3 * all.threads + all.images * all.heads - 1) / (all.images * all.heads);
    const int64_t share = (queries + wanted - 1) / wanted;
    return std::clamp<int64_t>((share + 47) / 48 * 48, 48, 288);
}

std::vector<Task> tasks_of(const detr_fast_attention& all, float* output, float* log_sum) {
    const int64_t total = std::accumulate(all.query_lengths, all.query_lengths + all.images, int64_t{0});
    std::vector<Task> tasks;
    int64_t first_token = 0, first_key = 0;
    for (int64_t i = 0; i < all.images; ++i) {
        const int64_t queries = all.query_lengths[i], keys = all.key_lengths[i], step = queries_per_task(all, queries);
        for (int64_t h = 0; h < all.heads; ++h) {
            for (int64_t q = 0; q < queries; q += step) {
                const int64_t token = first_token + q;
                tasks.push_back({at(all.query, token, h), at(all.key, first_key, h), at(all.value, first_key, h),
                                 output + (token * all.heads + h) * all.head_size, log_sum + h * total + token,
                                 std::min(step, queries - q), keys, q, h, i});
            }
        }
        first_token += queries;
        first_key += keys;
    }
    return tasks;
}

// Bytes: packed keys and values, a block of queries and their outputs, a tile; each on a cache line of its own.
size_t forward_scratch(int64_t keys, int64_t size) {
    return static_cast<size_t>(2 * (keys + 8) * size + (2 * size + tile_keys) * largest_block + 5 * 16) * sizeof(float);
}

// Zeros for queries of an image without keys.
void clear(const detr_fast_attention& all, const Task& task) {
    for (int64_t q = 0; q < task.queries; ++q) {
        std::fill_n(task.output + q * all.heads * all.head_size, all.head_size, 0.0f);
        task.log_sum[q] = 0.0f;
    }
}

}  // namespace
}  // namespace detr_fast

void detr_fast_attention_cpu(const detr_fast_attention* inputs, float* output, float* log_sum) {
    using namespace detr_fast;
    const auto tasks = tasks_of(*inputs, output, log_sum);
    parallel_for(static_cast<int64_t>(tasks.size()), inputs->threads, [&](int64_t t) {
        const Task& task = tasks[t];
        if (task.keys == 0) return clear(*inputs, task);
        const DenormalsAreZero denormals_are_zero;
        static thread_local Scratch scratch;
        with_widest_vectors(ForwardTask{*inputs, task, scratch.reserve(forward_scratch(task.keys, inputs->head_size))});
        scratch.release_if_large();
    });
}
