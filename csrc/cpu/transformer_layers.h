// The layers of a transformer for inference on the CPU, all of them in one call. See
// detr_fast/ops/transformer_layers/api.py for what they compute.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// Of a linear layer: the weight in the panels of gemm_tile.h, and the bias. Of a norm: [width] both.
struct detr_fast_weights {
    const float* weight;
    const float* bias;
};

struct detr_fast_encoder_layer {
    struct detr_fast_weights query_and_key, value, out, norm1, linear1, linear2, norm2;
};

// query, out_of_memory, key and value_of_memory are of the attention to the memory.
struct detr_fast_decoder_layer {
    struct detr_fast_weights query_and_key, value, out, norm1, query, out_of_memory, norm2, linear1, linear2, norm3;
    struct detr_fast_weights key, value_of_memory;
};

struct detr_fast_transformer_sizes {
    int64_t layers;
    int64_t width, inner;  // multiples of 64
    int64_t heads;         // of width / heads numbers, a multiple of 8 up to 128
    double eps;            // of every norm
    int64_t images;
    const int64_t* lengths;  // [images], the tokens of each
    int32_t threads;
};

// x, pos: [tokens, width]. Writes y and y_pos, with positions, of the same shape. Throws std::bad_alloc.
void detr_fast_encoder_layers_cpu(const struct detr_fast_transformer_sizes* sizes,
                                  const struct detr_fast_encoder_layer* layers, const float* x, const float* pos,
                                  float* y, float* y_pos);

// memory, memory_pos: [tokens, width]; query_pos: [queries, width]. Writes hs [layers, images, queries, width], or with
// `last_alone` [1, images, queries, width]. Throws std::bad_alloc.
struct detr_fast_decoder_inputs {
    const float *memory, *memory_pos, *query_pos;
    int64_t queries;
    struct detr_fast_weights norm;
    bool last_alone;
};

void detr_fast_decoder_layers_cpu(const struct detr_fast_transformer_sizes* sizes,
                                  const struct detr_fast_decoder_layer* layers,
                                  const struct detr_fast_decoder_inputs* inputs, float* hs);

#if defined(__cplusplus)
}
#endif
