// The backward of attention in tiles (Dao et al. 2022, "FlashAttention", algorithm 4): weights are computed again from
// scores and log_sum. With p the weights, g the output's gradient and "kept" dropout with its scale:
//   d = sum of g * output,  dp = kept(g value^T),  ds = p (dp - d),
//   value's gradient = kept(p)^T g,  key's = scale ds^T query,  query's = scale ds key.

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "attention.h"
#include "attention_tile.h"
#include "denormals.h"
#include "lanes.h"
#include "solver.h"
#include "thread_pool.h"

namespace detr_fast {
namespace {

// Some keys of one image in one head, and all queries that look at them.
struct Task {
    const float* query;
    const float* key;
    const float* value;
    const float* output;
    const float* output_gradient;
    const float* log_sum;
    float* query_gradient;  // of these keys alone
    float* key_gradient;
    float* value_gradient;
    int64_t queries;
    int64_t keys;
    int64_t first_key;  // within the image
    int64_t head;
    int64_t image;
};

struct KeyMemory {  // [keys, E], and [keys, E padded to pairs of vectors]
    float* key;
    float* value;
    float* key_gradient;
    float* value_gradient;
};

template <int Bytes>
DETR_FAST_INLINE int64_t padded(int64_t size) {
    constexpr int64_t pair = 2 * Registers<Bytes>::width;
    return (size + pair - 1) / pair * pair;
}

// The passes over a task's keys of one block of queries.
template <int Bytes, int vectors>
class Backward {
  public:
    using Floats = typename Registers<Bytes>::Floats;
    static constexpr int64_t lanes = vectors * Registers<Bytes>::width;

    DETR_FAST_INLINE Backward(const detr_fast_attention& all, const Task& task, int64_t first, const KeyMemory& keys,
                              unsigned char* memory)
        : all_(all), task_(task), keys_(keys), first_(first), count_(std::min(lanes, task.queries - first)) {
        const int64_t size = all.head_size;
        width_ = padded<Bytes>(size);
        auto layout = Layout::at(memory);
        for (float** array : {&query_, &gradient_, &query_gradient_}) layout.take(*array, size * lanes);
        for (float** array : {&query_rows_, &gradient_rows_}) layout.take(*array, width_ * lanes);
        for (float** array : {&weight_, &slope_}) layout.take(*array, tile_keys * lanes);
        const int64_t query_stride = all.query.token_stride, stride = all.heads * size;
        const float* query = task.query + first * query_stride;
        const float* gradient = task.output_gradient + first * stride;
        pack_transposed<Bytes>(query, query_stride, count_, size, lanes, sign_of_scale(all), query_);
        pack_transposed<Bytes>(gradient, stride, count_, size, lanes, 1.0f, gradient_);
        pack(query, query_stride, count_, size, width_, all.scale, query_rows_);
        pack(gradient, stride, count_, size, width_, all.dropout_scale, gradient_rows_);
        pack_transposed<Bytes>(task.output + first * stride, stride, count_, size, lanes, 1.0f, query_gradient_);
        find_mean_slopes();
        std::fill_n(query_gradient_, size * lanes, 0.0f);
        drops_ = all.dropout_threshold > 0;
        kept_.start(all, task.image, task.head, first);
    }

    DETR_FAST_INLINE void run() {
        for (int64_t key = 0; key < task_.keys; key += tile_keys) take_keys(key, std::min(tile_keys, task_.keys - key));
        const int64_t size = all_.head_size, stride = all_.heads * size;
        float scale[lanes];
        std::fill_n(scale, lanes, all_.scale);
        unpack_transposed<Bytes>(query_gradient_, scale, lanes, count_, size, task_.query_gradient + first_ * stride,
                                 stride);
    }

  private:
    // d, in the order of additions that dp has, so that their difference is 0 where it should be; then dropout's scale
    // for g. The output stands where the query's gradient will.
    DETR_FAST_INLINE void find_mean_slopes() {
        float log_sum[lanes] = {};
        std::copy_n(task_.log_sum + first_, count_, log_sum);
        unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA {
            log_sum_[v] = load_as<Floats>(log_sum + v * Registers<Bytes>::width);
            mean_slope_[v] = Floats{};
            for (int64_t place = v * Registers<Bytes>::width; place < all_.head_size * lanes; place += lanes) {
                const Floats gradient = load_as<Floats>(gradient_ + place);
                mean_slope_[v] += load_as<Floats>(query_gradient_ + place) * gradient;
                store_as(gradient_ + place, gradient * all_.dropout_scale);
            }
        });
    }

    DETR_FAST_INLINE void take_keys(int64_t first, int64_t count) {
        const int64_t size = all_.head_size, rows = whole_blocks<Bytes>(count);
        const float* keys = keys_.key + first * size;
        const float factor = factor_of_scores(all_);
        multiply<Bytes, vectors>(keys, rows, size, 1, query_, lanes, size,
                                 [&](int64_t row, auto v, const Floats& score) DETR_FAST_LAMBDA {
                                     store_as(weight_ + row * lanes + v * Registers<Bytes>::width,
                                              exp2_of_nonpositive<Bytes>(score * factor - log_sum_[v]));
                                 });
        multiply<Bytes, vectors>(keys_.value + first * size, rows, size, 1, gradient_, lanes, size,
                                 [&](int64_t row, auto v, const Floats& slope) DETR_FAST_LAMBDA {
                                     store_as(slope_ + row * lanes + v * Registers<Bytes>::width, slope);
                                 });
        drops_ ? find_slopes<true>(first, count) : find_slopes<false>(first, count);
        add_to_keys(weight_, rows, gradient_rows_, keys_.value_gradient + first * width_);
        add_to_keys(slope_, rows, query_rows_, keys_.key_gradient + first * width_);
        multiply<Bytes, vectors>(keys, size, 1, size, slope_, lanes, count,
                                 [&](int64_t row, auto v, const Floats& sum) DETR_FAST_LAMBDA {
                                     add_at(query_gradient_ + row * lanes + v * Registers<Bytes>::width, sum);
                                 });
    }

    // The slopes of weights become those of scores, and weights those that were kept.
    template <bool drops>
    DETR_FAST_INLINE void find_slopes(int64_t first, int64_t count) {
        for (int64_t row = 0; row < count; ++row) {
            const int64_t key = task_.first_key + first + row;
            if (drops && row % kept_.group_keys == 0) kept_.draw(key);
            unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA {
                const int64_t place = row * lanes + v * Registers<Bytes>::width;
                const Floats weight = load_as<Floats>(weight_ + place);
                Floats slope = load_as<Floats>(slope_ + place);
                if (drops) {
                    slope = kept_.kept(key, v * Registers<Bytes>::width, slope);
                    store_as(weight_ + place, kept_.kept(key, v * Registers<Bytes>::width, weight));
                }
                store_as(slope_ + place, weight * (slope - mean_slope_[v]));
            });
        }
    }

    // sums[key] += sum over the queries of tile[key][query] * rows[query], two vectors at a time.
    DETR_FAST_INLINE void add_to_keys(const float* tile, int64_t keys, const float* rows, float* sums) {
        for (int64_t e = 0; e < width_; e += 2 * Registers<Bytes>::width) {
            multiply<Bytes, 2>(tile, keys, lanes, 1, rows + e, width_, count_,
                               [&](int64_t row, auto v, const Floats& sum) DETR_FAST_LAMBDA {
                                   add_at(sums + row * width_ + e + v * Registers<Bytes>::width, sum);
                               });
        }
    }

    static DETR_FAST_INLINE void add_at(float* place, const Floats& sum) {
        store_as(place, load_as<Floats>(place) + sum);
    }

    const detr_fast_attention& all_;
    const Task& task_;
    const KeyMemory& keys_;
    int64_t first_, count_, width_;
    bool drops_;
    float *query_, *gradient_, *query_gradient_;  // [E, lanes]
    float *query_rows_, *gradient_rows_;          // [lanes, width_]
    float *weight_, *slope_;                      // [tile_keys, lanes]
    Floats log_sum_[vectors];
    Floats mean_slope_[vectors];
    KeptWeights<Bytes, vectors> kept_;
};

template <int Bytes>
DETR_FAST_INLINE void backward(const detr_fast_attention& all, const Task& task, unsigned char* memory) {
    const int64_t size = all.head_size, width = padded<Bytes>(size), stride = all.heads * size;
    const int64_t rows = whole_blocks<Bytes>(task.keys);
    auto layout = Layout::at(memory);
    KeyMemory keys;
    for (float** array : {&keys.key, &keys.value}) layout.take(*array, rows * size);
    for (float** array : {&keys.key_gradient, &keys.value_gradient}) {
        layout.take(*array, rows * width);
        std::fill_n(*array, rows * width, 0.0f);
    }
    unsigned char* rest;
    layout.take(rest, 0);
    pack_keys<Bytes>(task.key, all.key.token_stride, task.keys, size, keys.key);
    pack_keys<Bytes>(task.value, all.value.token_stride, task.keys, size, keys.value);
    for (int64_t q = 0; q < task.queries;) {
        const bool two = takes_two<Bytes>(task.queries - q);
        if (two) Backward<Bytes, 2>(all, task, q, keys, rest).run();
        if (!two) Backward<Bytes, 3>(all, task, q, keys, rest).run();
        q += (two ? 2 : 3) * Registers<Bytes>::width;
    }
    for (int64_t k = 0; k < task.keys; ++k) {
        std::copy_n(keys.key_gradient + k * width, size, task.key_gradient + k * stride);
        std::copy_n(keys.value_gradient + k * width, size, task.value_gradient + k * stride);
    }
}

struct BackwardTask {
    const detr_fast_attention& all;
    const Task& task;
    unsigned char* memory;

    template <int Bytes>
    bool run() const {
        backward<Bytes>(all, task, memory);
        return true;
    }
};

// Bytes: KeyMemory, and what a block of queries needs; each on a cache line of its own.
size_t backward_scratch(int64_t keys, int64_t size) {
    const int64_t width = size + 32;
    const int64_t block = (3 * size + 2 * width + 2 * tile_keys) * largest_block;
    return static_cast<size_t>(2 * (keys + 8) * (size + width) + block + 13 * 16) * sizeof(float);
}

// How an image's keys are divided among tasks: by shapes alone, so that sums are the same whatever the threads. Each
// part of the keys yields a query gradient of its own to add up, so there are only as many as keep a few threads busy.
struct Parts {
    int64_t count, keys;

    static Parts of(const detr_fast_attention& all, int64_t keys) {
        constexpr int64_t tasks = 32, fewest_keys = 256, group = 32;
        const int64_t wanted = (tasks + all.images * all.heads - 1) / std::max<int64_t>(all.images * all.heads, 1);
        const int64_t most = std::clamp<int64_t>((keys + fewest_keys - 1) / fewest_keys, 1, wanted);
        const int64_t step = std::max(((keys + most - 1) / most + group - 1) / group * group, group);
        return {std::max<int64_t>((keys + step - 1) / step, 1), step};
    }
};

struct Plan {
    std::vector<Task> tasks;
    std::vector<Parts> parts;  // of each image
    std::unique_ptr<float[]>
        partial;  // query gradients of all parts but the first, [parts - 1, query tokens, heads, E]
    size_t partial_floats;
};

Plan plan_of(const detr_fast_attention& all, const detr_fast_attention_gradients& gradients, int64_t total) {
    Plan plan;
    for (int64_t i = 0; i < all.images; ++i) plan.parts.push_back(Parts::of(all, all.key_lengths[i]));
    int64_t most = 1;
    for (const Parts& parts : plan.parts) most = std::max(most, parts.count);
    const int64_t stride = all.heads * all.head_size;
    plan.partial_floats = static_cast<size_t>((most - 1) * total * stride);
    plan.partial.reset(new float[plan.partial_floats]);
    int64_t query = 0, first_key = 0;
    for (int64_t i = 0; i < all.images; ++i) {
        for (int64_t h = 0; h < all.heads; ++h) {
            for (int64_t part = 0; part < plan.parts[i].count; ++part) {
                const int64_t begin = part * plan.parts[i].keys, key = first_key + begin;
                const int64_t queries = query * stride + h * all.head_size, keys = key * stride + h * all.head_size;
                float* partial = part == 0 ? gradients.query : plan.partial.get() + (part - 1) * total * stride;
                plan.tasks.push_back({at(all.query, query, h), at(all.key, key, h), at(all.value, key, h),
                                      gradients.output + queries, gradients.output_gradient + queries,
                                      gradients.log_sum + h * total + query, partial + queries, gradients.key + keys,
                                      gradients.value + keys, all.query_lengths[i],
                                      std::min(plan.parts[i].keys, all.key_lengths[i] - begin), begin, h, i});
            }
        }
        query += all.query_lengths[i];
        first_key += all.key_lengths[i];
    }
    return plan;
}

void add_parts(const detr_fast_attention& all, const Plan& plan, int64_t total, float* query_gradient) {
    const int64_t stride = all.heads * all.head_size;
    int64_t query = 0;
    for (int64_t i = 0; i < all.images; ++i) {
        const int64_t numbers = all.query_lengths[i] * stride;
        float* __restrict__ sum = query_gradient + query * stride;
        for (int64_t part = 1; part < plan.parts[i].count; ++part) {
            const float* __restrict__ more = plan.partial.get() + ((part - 1) * total + query) * stride;
            for (int64_t n = 0; n < numbers; ++n) sum[n] += more[n];
        }
        query += all.query_lengths[i];
    }
}

}  // namespace
}  // namespace detr_fast

void detr_fast_attention_backward_cpu(const detr_fast_attention* inputs,
                                      const detr_fast_attention_gradients* gradients) {
    using namespace detr_fast;
    const int64_t total = std::accumulate(inputs->query_lengths, inputs->query_lengths + inputs->images, int64_t{0});
    const Plan plan = plan_of(*inputs, *gradients, total);
    const CallMemory use(plan.partial_floats * sizeof(float));
    parallel_for(static_cast<int64_t>(plan.tasks.size()), inputs->threads, [&](int64_t t) {
        static thread_local Scratch scratch;
        const Task& task = plan.tasks[t];
        const DenormalsAreZero denormals_are_zero;
        with_widest_vectors(
            BackwardTask{*inputs, task, scratch.reserve(backward_scratch(task.keys, inputs->head_size))});
        scratch.release_if_large();
    });
    add_parts(*inputs, plan, total, gradients->query);
}
