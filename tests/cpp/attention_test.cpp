// csrc/cpu/attention*.cpp under sanitizers: outputs and gradients at every width of vectors against sums as the formula
// has them, in memory of exactly the bytes that there are, and many threads at once. Exits with 0 where all is well.

#include "attention.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "widths.h"

namespace {

using Numbers = std::vector<float>;

void require(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what.c_str());
    std::exit(1);
}

Numbers random_numbers(std::mt19937& random, int64_t count) {
    Numbers numbers(static_cast<size_t>(count));
    std::normal_distribution<float> normal;
    for (float& x : numbers) x = normal(random);
    return numbers;
}

// Queries beside which nothing lies, keys and values that are parts of one tensor.
struct Case {
    std::vector<int64_t> query_lengths, key_lengths;
    int64_t heads, size, queries = 0, keys = 0;
    Numbers query, key_value, gradient;

    Case(std::mt19937& random, std::vector<int64_t> queries_, std::vector<int64_t> keys_, int64_t heads_, int64_t size_)
        : query_lengths(std::move(queries_)), key_lengths(std::move(keys_)), heads(heads_), size(size_) {
        for (const int64_t n : query_lengths) queries += n;
        for (const int64_t n : key_lengths) keys += n;
        query = random_numbers(random, queries * heads * size);
        key_value = random_numbers(random, keys * 2 * heads * size);
        gradient = random_numbers(random, queries * heads * size);
    }

    detr_fast_attention inputs(int threads, int64_t threshold) const {
        const int64_t stride = heads * size;
        return {{query.data(), stride, size},
                {key_value.data(), 2 * stride, size},
                {key_value.data() + stride, 2 * stride, size},
                query_lengths.data(),
                key_lengths.data(),
                static_cast<int64_t>(query_lengths.size()),
                heads,
                size,
                0.3f,
                threshold,
                12345u,
                threshold == 0 ? 1.0f : 1.5f,
                threads};
    }
};

struct Results {
    Numbers output, log_sum, query, key, value;

    explicit Results(const Case& c) {
        for (Numbers* x : {&output, &query}) x->assign(c.query.size(), NAN);
        for (Numbers* x : {&key, &value}) x->assign(c.key_value.size() / 2, NAN);
        log_sum.assign(static_cast<size_t>(c.queries * c.heads), NAN);
    }

    static Results of(const Case& c, int threads, int64_t threshold) {
        Results r(c);
        const auto inputs = c.inputs(threads, threshold);
        detr_fast_attention_cpu(&inputs, r.output.data(), r.log_sum.data());
        const detr_fast_attention_gradients gradients{r.output.data(), c.gradient.data(), r.log_sum.data(),
                                                      r.query.data(),  r.key.data(),      r.value.data()};
        detr_fast_attention_backward_cpu(&inputs, &gradients);
        return r;
    }

    bool operator==(const Results& other) const {
        return output == other.output && query == other.query && key == other.key && value == other.value;
    }
};

// One query's weights of its image's keys, and their slopes: what output and gradients are sums of.
void add_query(const Case& c, int64_t token, int64_t head, int64_t first_key, int64_t keys, Results& sums) {
    const int64_t stride = c.heads * c.size, query = token * stride + head * c.size;
    std::vector<double> weight(static_cast<size_t>(keys)), slope(weight.size());
    double total = 0, mean = 0;
    for (int64_t k = 0; k < keys; ++k) {
        const int64_t key = (first_key + k) * 2 * stride + head * c.size;
        for (int64_t e = 0; e < c.size; ++e) {
            weight[k] += 0.3 * c.query[query + e] * c.key_value[key + e];
            slope[k] += double{c.gradient[query + e]} * c.key_value[key + stride + e];
        }
        total += weight[k] = std::exp(weight[k]);
    }
    for (int64_t k = 0; k < keys; ++k) mean += (weight[k] /= total) * slope[k];
    for (int64_t k = 0; k < keys; ++k) {
        const int64_t key = (first_key + k) * 2 * stride + head * c.size;
        const int64_t gradient = (first_key + k) * stride + head * c.size;
        const double score_slope = 0.3 * weight[k] * (slope[k] - mean);
        for (int64_t e = 0; e < c.size; ++e) {
            sums.output[query + e] += static_cast<float>(weight[k] * c.key_value[key + stride + e]);
            sums.query[query + e] += static_cast<float>(score_slope * c.key_value[key + e]);
            sums.key[gradient + e] += static_cast<float>(score_slope * c.query[query + e]);
            sums.value[gradient + e] += static_cast<float>(weight[k] * c.gradient[query + e]);
        }
    }
}

Results expected(const Case& c) {
    Results sums(c);
    for (Numbers* x : {&sums.output, &sums.query, &sums.key, &sums.value}) x->assign(x->size(), 0.0f);
    int64_t token = 0, first_key = 0;
    for (size_t i = 0; i < c.query_lengths.size(); ++i) {
        for (int64_t q = 0; q < c.query_lengths[i]; ++q, ++token) {
            for (int64_t h = 0; h < c.heads; ++h) add_query(c, token, h, first_key, c.key_lengths[i], sums);
        }
        first_key += c.key_lengths[i];
    }
    return sums;
}

void require_close(const Numbers& found, const Numbers& wanted, const std::string& what) {
    for (size_t i = 0; i < found.size(); ++i) {
        require(std::abs(found[i] - wanted[i]) < 1e-4f * (1.0f + std::abs(wanted[i])), what);
    }
}

void test_every_width(std::mt19937& random) {
    const Case cases[] = {{random, {1}, {1}, 1, 8},     {random, {20, 0, 3}, {7, 5, 0}, 2, 32},
                          {random, {49}, {70}, 1, 24},  {random, {100, 2}, {33, 130}, 1, 16},
                          {random, {9}, {600}, 1, 128}, {random, {}, {}, 2, 32}};
    for (const Case& c : cases) {
        const Results wanted = expected(c);
        for (const int bytes : {16, 32, 64}) {
            detr_fast::limit_vector_bytes(bytes);
            const Results found = Results::of(c, 2, 0);
            const std::string at = " with vectors of " + std::to_string(bytes);
            require_close(found.output, wanted.output, "output" + at);
            require_close(found.query, wanted.query, "the query's gradient" + at);
            require_close(found.key, wanted.key, "the key's gradient" + at);
            require_close(found.value, wanted.value, "the value's gradient" + at);
        }
    }
}

void test_callers_at_once(std::mt19937& random) {
    const Case c(random, {60, 5}, {300, 40}, 2, 32);
    const Results wanted = Results::of(c, 1, 20000);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&] {
            for (int n = 0; n < 5; ++n)
                require(Results::of(c, 3, 20000) == wanted, "callers do not disturb each other");
        });
    }
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
    std::mt19937 random(std::random_device{}());
    test_every_width(random);
    test_callers_at_once(random);
    return 0;
}
