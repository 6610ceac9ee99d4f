// csrc/cuda/assignment.cu on the host; see cuda_runtime.h beside this file.

#include "assignment.cu"

namespace detr_fast {
namespace {
alignas(16) unsigned char shared_memory[256 * 1024];
}
}  // namespace detr_fast

unsigned char* simt::shared_memory = detr_fast::shared_memory;
size_t simt::shared_capacity = sizeof detr_fast::shared_memory;
