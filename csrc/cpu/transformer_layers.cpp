// Every stage is a loop over blocks of tokens whose rows stay in a core's cache from one product to the next; only
// attention needs what all blocks gave. Weights are read once for each block.

#include "transformer_layers.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../result_memory.h"
#include "attention.h"
#include "lanes.h"
#include "solver.h"
#include "thread_pool.h"
#include "token_rows.h"

namespace detr_fast {
namespace {

using Sizes = detr_fast_transformer_sizes;
using Weights = detr_fast_weights;

// Rows of a block: with what a thread keeps of them they take 640 KiB of its L2 at a width of 256.
constexpr int64_t most_rows = 160;
// Columns of the feed-forward network's inner map that are made and used at once.
constexpr int64_t inner_columns = 512;

// Memory for one call.
class Workspace {
  public:
    explicit Workspace(int64_t floats) : piece_(take_memory(static_cast<size_t>(floats) * sizeof(float) + 1024)) {
        layout_ = Layout::at(piece_.memory);
    }
    ~Workspace() { give_back_memory(piece_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* take(int64_t floats) {
        float* array;
        layout_.take(array, floats);
        return array;
    }

  private:
    Piece piece_;
    Layout layout_;
};

// What a thread keeps of a block of rows.
struct Block {
    float *sum, *x, *inner;

    explicit Block(int64_t width) {
        static thread_local Scratch memory;
        const size_t floats = static_cast<size_t>(most_rows * (2 * width + inner_columns)) + 3 * 16;
        auto layout = Layout::at(memory.reserve(floats * sizeof(float)));
        for (float** array : {&sum, &x}) layout.take(*array, most_rows * width);
        layout.take(inner, most_rows * inner_columns);
    }
};

struct Rows {
    int64_t first, count;
};

// Calls visit(rows) for blocks of `total` rows, as many for each thread.
template <typename Visit>
void each_block(int64_t total, int threads, const Visit& visit) {
    const int64_t share = (total + threads - 1) / threads;
    const int64_t blocks = (share + most_rows - 1) / most_rows * threads;
    parallel_for(blocks, threads, [&](int64_t b) {
        const int64_t first = total * b / blocks, end = total * (b + 1) / blocks;
        if (first < end) visit(Rows{first, end - first});
    });
}

// Tokens of one kind, [tokens, width] each.
struct State {
    float *x, *x_pos;
    const float* pos;  // of every token, or of every query of an image
    int64_t pos_rows;
};

class Layers {
  public:
    explicit Layers(const Sizes& sizes) : sizes_(sizes), width_(sizes.width) {}

    // out = x * weight + bias for rows of tokens, in steps of out_step.
    void project(const float* x, Rows rows, const Weights& of, int64_t columns, float* out, int64_t out_step) const {
        with_widest_vectors(RowProduct{x + rows.first * width_, width_, rows.count, width_, of.weight, width_, columns,
                                       of.bias, nullptr, 0, false, out + rows.first * out_step, out_step});
    }

    // Queries, keys and values of self-attention, [tokens, 3 * width].
    void project_self(const State& state, Rows rows, const Weights& query_and_key, const Weights& value,
                      float* out) const {
        project(state.x_pos, rows, query_and_key, 2 * width_, out, 3 * width_);
        project(state.x, rows, value, width_, out + 2 * width_, 3 * width_);
    }

    // block.sum = x + what attention gave, projected.
    void add_heads(const State& state, Rows rows, const float* heads, const Weights& of, const Block& block) const {
        const int64_t place = rows.first * width_;
        with_widest_vectors(RowProduct{heads + place, width_, rows.count, width_, of.weight, width_, width_, of.bias,
                                       state.x + place, width_, false, block.sum, width_});
    }

    // block.sum = block.x + its feed-forward network.
    void feed_forward(Rows rows, const Weights& linear1, const Weights& linear2, const Block& block) const {
        const int64_t inner = sizes_.inner;
        for (int64_t first = 0; first < inner; first += inner_columns) {
            const int64_t columns = std::min(inner_columns, inner - first);
            with_widest_vectors(RowProduct{block.x, width_, rows.count, width_, linear1.weight + first * width_, width_,
                                           columns, linear1.bias + first, nullptr, 0, true, block.inner, columns});
            const bool begins = first == 0;
            with_widest_vectors(RowProduct{
                block.inner, columns, rows.count, columns, linear2.weight + first * panel_columns, inner, width_,
                begins ? linear2.bias : nullptr, begins ? block.x : block.sum, width_, false, block.sum, width_});
        }
    }

    void norm(const float* sum, int64_t rows, const Weights& of, float* out) const {
        with_widest_vectors(RowNorm{sum, rows, width_, of.weight, of.bias, sizes_.eps, out, nullptr, 0, 1, nullptr});
    }

    // The tokens' new rows, without and with positions.
    void norm(const Block& block, Rows rows, const Weights& of, const State& state) const {
        const int64_t place = rows.first * width_;
        with_widest_vectors(RowNorm{block.sum, rows.count, width_, of.weight, of.bias, sizes_.eps, state.x + place,
                                    state.pos, rows.first, state.pos_rows, state.x_pos + place});
    }

    void attend(const detr_fast_tokens& query, const detr_fast_tokens& key, const detr_fast_tokens& value,
                const int64_t* query_lengths, float* heads, float* log_sum) const {
        const int64_t size = width_ / sizes_.heads;
        const float scale = 1.0f / std::sqrt(static_cast<float>(size));
        const detr_fast_attention inputs{
            query, key, value, query_lengths, sizes_.lengths, sizes_.images, sizes_.heads, size,
            scale, 0,   0,     1.0f,          sizes_.threads};
        detr_fast_attention_cpu(&inputs, heads, log_sum);
    }

    // Columns from `first` on of a matrix in steps of `step`, as heads.
    detr_fast_tokens heads_of(const float* matrix, int64_t first, int64_t step) const {
        return {matrix + first, step, width_ / sizes_.heads};
    }

    int64_t tokens() const { return std::accumulate(sizes_.lengths, sizes_.lengths + sizes_.images, int64_t{0}); }

  private:
    const Sizes& sizes_;
    const int64_t width_;
};

}  // namespace
}  // namespace detr_fast

void detr_fast_encoder_layers_cpu(const detr_fast_transformer_sizes* sizes, const detr_fast_encoder_layer* layers,
                                  const float* x, const float* pos, float* y, float* y_pos) {
    using namespace detr_fast;
    const Layers all(*sizes);
    const int64_t width = sizes->width, tokens = all.tokens();
    Workspace memory(tokens * (4 * width + sizes->heads));
    float *const projected = memory.take(tokens * 3 * width), *const heads = memory.take(tokens * width);
    float* const log_sum = memory.take(tokens * sizes->heads);
    const State state{y, y_pos, pos, std::max<int64_t>(tokens, 1)};
    each_block(tokens, sizes->threads, [&](Rows rows) {
        const int64_t begin = rows.first * width, end = begin + rows.count * width;
        std::copy(x + begin, x + end, y + begin);
        for (int64_t i = begin; i < end; ++i) y_pos[i] = x[i] + pos[i];
        if (sizes->layers > 0) all.project_self(state, rows, layers->query_and_key, layers->value, projected);
    });
    for (const auto* layer = layers; layer != layers + sizes->layers; ++layer) {
        const auto part = [&](int64_t i) { return all.heads_of(projected, i * width, 3 * width); };
        all.attend(part(0), part(1), part(2), sizes->lengths, heads, log_sum);
        each_block(tokens, sizes->threads, [&](Rows rows) {
            const Block block(width);
            all.add_heads(state, rows, heads, layer->out, block);
            all.norm(block.sum, rows.count, layer->norm1, block.x);
            all.feed_forward(rows, layer->linear1, layer->linear2, block);
            all.norm(block, rows, layer->norm2, state);
            const auto* next = layer + 1;
            if (next == layers + sizes->layers) return;
            all.project_self(state, rows, next->query_and_key, next->value, projected);
        });
    }
}

void detr_fast_decoder_layers_cpu(const detr_fast_transformer_sizes* sizes, const detr_fast_decoder_layer* layers,
                                  const detr_fast_decoder_inputs* in, float* hs) {
    using namespace detr_fast;
    const Layers all(*sizes);
    const int64_t width = sizes->width, memory_tokens = all.tokens(), tokens = sizes->images * in->queries;
    const std::vector<int64_t> lengths(static_cast<size_t>(sizes->images), in->queries);
    Sizes of_queries = *sizes;
    of_queries.lengths = lengths.data();
    const Layers queries(of_queries);
    Workspace memory(tokens * (6 * width + sizes->heads) + memory_tokens * 2 * width);
    const State state{memory.take(tokens * width), memory.take(tokens * width), in->query_pos, in->queries};
    float *const projected = memory.take(tokens * 3 * width), *const heads = memory.take(tokens * width);
    float* const log_sum = memory.take(tokens * sizes->heads);
    float* const of_memory = memory.take(memory_tokens * 2 * width);
    std::fill_n(state.x, tokens * width, 0.0f);
    for (const auto* layer = layers; layer != layers + sizes->layers; ++layer) {
        const bool is_last = layer + 1 == layers + sizes->layers;
        each_block(memory_tokens, sizes->threads, [&](Rows rows) {
            all.project(in->memory_pos, rows, layer->key, width, of_memory, 2 * width);
            all.project(in->memory, rows, layer->value_of_memory, width, of_memory + width, 2 * width);
        });
        if (layer == layers) {
            // All queries start as zeros and have the same value: whatever their weights are, they sum to 1.
            for (int64_t t = 0; t < tokens; ++t) std::copy_n(layer->value.bias, width, heads + t * width);
        } else {
            const auto part = [&](int64_t i) { return queries.heads_of(projected, i * width, 3 * width); };
            queries.attend(part(0), part(1), part(2), lengths.data(), heads, log_sum);
        }
        each_block(tokens, sizes->threads, [&](Rows rows) {
            const Block block(width);
            all.add_heads(state, rows, heads, layer->out, block);
            all.norm(block, rows, layer->norm1, state);
            all.project(state.x_pos, rows, layer->query, width, projected, width);
        });
        all.attend(all.heads_of(projected, 0, width), all.heads_of(of_memory, 0, 2 * width),
                   all.heads_of(of_memory, width, 2 * width), lengths.data(), heads, log_sum);
        each_block(tokens, sizes->threads, [&](Rows rows) {
            const Block block(width);
            all.add_heads(state, rows, heads, layer->out_of_memory, block);
            all.norm(block.sum, rows.count, layer->norm2, block.x);
            all.feed_forward(rows, layer->linear1, layer->linear2, block);
            all.norm(block, rows, layer->norm3, state);
            if (is_last || !in->last_alone) {
                const int64_t before = in->last_alone ? 0 : (layer - layers) * tokens;
                const int64_t place = rows.first * width;
                all.norm(state.x + place, rows.count, in->norm, hs + before * width + place);
            }
            if (!is_last) all.project_self(state, rows, layer[1].query_and_key, layer[1].value, projected);
        });
    }
}
