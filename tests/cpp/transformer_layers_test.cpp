// csrc/cpu/transformer_layers.cpp under sanitizers, in arrays that are no larger than they have to be, by several
// callers at once, with an attention of a few lines, because the real one has a test of its own and takes minutes to
// compile. Exits with 0 where all callers get the same, and rows that a norm gave.

#include "transformer_layers.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <random>
#include <thread>
#include <vector>

#include "attention.h"
#include "gemm_tile.h"
#include "require.h"

namespace {

using Floats = std::vector<float>;

struct Size {
    std::vector<int64_t> lengths;
    int64_t queries, width, inner, heads, layers;
};

class Model {
  public:
    explicit Model(const Size& size) : size_(size) {
        const int64_t d = size.width, f = size.inner;
        for (int64_t i = 0; i < size.layers; ++i) {
            encoder_.push_back(
                {linear(d, 2 * d), linear(d, d), linear(d, d), norm(), linear(d, f), linear(f, d), norm()});
            decoder_.push_back({linear(d, 2 * d), linear(d, d), linear(d, d), norm(), linear(d, d), linear(d, d),
                                norm(), linear(d, f), linear(f, d), norm(), linear(d, d), linear(d, d)});
        }
        last_ = norm();
        for (const int64_t length : size.lengths) tokens_ += length;
        for (Floats* array : {&x_, &pos_}) *array = random_floats(tokens_ * d);
        query_pos_ = random_floats(size.queries * d);
    }

    Floats run(int threads, bool last_alone) const {
        const int64_t images = static_cast<int64_t>(size_.lengths.size());
        const detr_fast_transformer_sizes sizes{size_.layers, size_.width, size_.inner,          size_.heads,
                                                1e-5,         images,      size_.lengths.data(), threads};
        Floats memory(x_.size(), NAN), memory_pos(x_.size(), NAN);
        detr_fast_encoder_layers_cpu(&sizes, encoder_.data(), x_.data(), pos_.data(), memory.data(), memory_pos.data());
        Floats hs((last_alone ? 1 : size_.layers) * images * size_.queries * size_.width, NAN);
        const detr_fast_decoder_inputs inputs{memory.data(), memory_pos.data(), query_pos_.data(), size_.queries,
                                              last_,         last_alone};
        detr_fast_decoder_layers_cpu(&sizes, decoder_.data(), &inputs, hs.data());
        hs.insert(hs.end(), memory.begin(), memory.end());
        return hs;
    }

    int64_t width() const { return size_.width; }

  private:
    Floats random_floats(int64_t count) {
        std::normal_distribution<float> normal;
        Floats numbers(static_cast<size_t>(count));
        for (float& x : numbers) x = normal(random_);
        return numbers;
    }

    const float* keep(Floats numbers) { return arrays_.emplace_back(std::move(numbers)).data(); }

    detr_fast_weights linear(int64_t inputs, int64_t outputs) {
        Floats weight = random_floats(inputs * outputs), packed(detr_fast::packed_floats(inputs, outputs));
        for (float& x : weight) x /= std::sqrt(static_cast<float>(inputs));
        detr_fast::pack_panels(weight.data(), inputs, outputs, outputs, 1, packed.data());
        return {keep(std::move(packed)), keep(random_floats(outputs))};
    }

    detr_fast_weights norm() { return {keep(Floats(size_.width, 1.0f)), keep(Floats(size_.width, 0.0f))}; }

    Size size_;
    std::mt19937 random_{1};
    std::deque<Floats> arrays_;
    std::vector<detr_fast_encoder_layer> encoder_;
    std::vector<detr_fast_decoder_layer> decoder_;
    detr_fast_weights last_;
    int64_t tokens_ = 0;
    Floats x_, pos_, query_pos_;
};

void rows_are_normal(const Floats& rows, int64_t width) {
    for (size_t first = 0; first < rows.size(); first += static_cast<size_t>(width)) {
        double sum = 0, squares = 0;
        for (int64_t c = 0; c < width; ++c) {
            sum += rows[first + c];
            squares += static_cast<double>(rows[first + c]) * rows[first + c];
        }
        require(std::abs(sum / width) < 1e-4 && std::abs(squares / width - 1) < 1e-3, "a normal row");
    }
}

void everyone_gets_the_same(const Size& size) {
    const Model model(size);
    const Floats expected = model.run(1, false);
    rows_are_normal(expected, model.width());
    std::vector<std::thread> callers;
    for (int threads = 1; threads <= 3; ++threads) {
        callers.emplace_back(
            [&, threads] { require(model.run(threads, false) == expected, "the same for every caller"); });
    }
    for (auto& caller : callers) caller.join();
    const Floats last = model.run(2, true);
    const size_t left_out = expected.size() - last.size();
    require(Floats(expected.begin() + left_out, expected.end()) == last, "the last layer alone");
}

const float* row(const detr_fast_tokens& tokens, int64_t token, int64_t head) {
    return tokens.data + token * tokens.token_stride + head * tokens.head_stride;
}

void attend(const detr_fast_attention& a, int64_t query, int64_t head, int64_t first_key, int64_t keys, float* output) {
    std::fill_n(output, a.head_size, 0.0f);
    float sum = 0;
    for (int64_t k = first_key; k < first_key + keys; ++k) {
        float score = 0;
        for (int64_t e = 0; e < a.head_size; ++e) score += row(a.query, query, head)[e] * row(a.key, k, head)[e];
        const float weight = std::exp(a.scale * score);
        for (int64_t e = 0; e < a.head_size; ++e) output[e] += weight * row(a.value, k, head)[e];
        sum += weight;
    }
    for (int64_t e = 0; e < a.head_size && keys > 0; ++e) output[e] /= sum;
}

}  // namespace

void detr_fast_attention_cpu(const detr_fast_attention* a, float* output, float* log_sum) {
    int64_t query = 0, key = 0;
    for (int64_t i = 0; i < a->images; key += a->key_lengths[i++]) {
        for (const int64_t end = query + a->query_lengths[i]; query < end; ++query) {
            for (int64_t h = 0; h < a->heads; ++h) {
                attend(*a, query, h, key, a->key_lengths[i], output + (query * a->heads + h) * a->head_size);
            }
        }
    }
    std::fill_n(log_sum, a->heads * query, 0.0f);
}

int main() {
    everyone_gets_the_same({{7, 1, 13}, 5, 64, 128, 2, 2});
    everyone_gets_the_same({{170}, 3, 64, 576, 8, 1});
    everyone_gets_the_same({{4, 0}, 1, 128, 64, 4, 2});
    return 0;
}
