// How numbers lie in memory, as a number that Python hands over.

#pragma once

enum detr_fast_dtype {
    detr_fast_float32 = 0,
    detr_fast_float64 = 1,
    detr_fast_bfloat16 = 2,
    detr_fast_float16 = 3,
};
