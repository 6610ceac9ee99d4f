// Attention over packed tokens on the CPU. See detr_fast/ops/attention/api.py for what it computes.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// Tokens of all images one after the other, [tokens, heads, head_size] float32; strides in elements, 1 within a head.
struct detr_fast_tokens {
    const float* data;
    int64_t token_stride;
    int64_t head_stride;
};

struct detr_fast_attention {
    struct detr_fast_tokens query;
    struct detr_fast_tokens key;
    struct detr_fast_tokens value;
    const int64_t* query_lengths;  // [images]
    const int64_t* key_lengths;    // [images]
    int64_t images;
    int64_t heads;
    int64_t head_size;  // a multiple of 8, at most 128
    float scale;
    int64_t dropout_threshold;  // in [0, 65536], see detr_fast/ops/dropout.py; 0 is no dropout
    uint64_t dropout_seed;
    float dropout_scale;  // of weights that are kept
    int32_t threads;
};

// Writes output [query tokens, heads, head_size], zeros for a query of an image without keys, and, for the backward,
// log_sum [heads, query tokens]: log2 of the sum over the keys of e^score. Throws std::bad_alloc.
void detr_fast_attention_cpu(const struct detr_fast_attention* inputs, float* output, float* log_sum);

// What the backward starts from, [query tokens, heads, head_size] and log_sum as above, and where it writes: like
// query, key and value, without gaps.
struct detr_fast_attention_gradients {
    const float* output;
    const float* output_gradient;
    const float* log_sum;
    float* query;
    float* key;
    float* value;
};

// The same bits for any number of threads. Throws std::bad_alloc.
void detr_fast_attention_backward_cpu(const struct detr_fast_attention* inputs,
                                      const struct detr_fast_attention_gradients* gradients);

#if defined(__cplusplus)
}
#endif
