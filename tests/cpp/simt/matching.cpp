// csrc/cuda/matching.cu on the host; see cuda_runtime.h beside this file.

#include "matching.cu"

namespace detr_fast {
namespace {
alignas(16) unsigned char shared_memory[256 * 1024];
}
}  // namespace detr_fast

unsigned char* simt::shared_memory = detr_fast::shared_memory;
size_t simt::shared_capacity = sizeof detr_fast::shared_memory;

// Every value of the half types as a float, [65536] each.
extern "C" void simt_widen_all(float* of_bfloat16, float* of_float16) {
    for (unsigned bits = 0; bits < 65536; ++bits) {
        of_bfloat16[bits] = detr_fast::widened(detr_fast::Bfloat16{static_cast<uint16_t>(bits)});
        of_float16[bits] = detr_fast::widened(detr_fast::Float16{static_cast<uint16_t>(bits)});
    }
}
