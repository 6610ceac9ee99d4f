// Arithmetic on denormal numbers takes x86 processors a hundred times as long as on others.

#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace detr_fast {

// While it exists, this thread takes denormal numbers for zero. Weights of keys that are far from the best one are such
// numbers: where scores spread by more than 87, attention's backward takes 50 times as long with them.
class DenormalsAreZero {
  public:
#if defined(__SSE2__)
    DenormalsAreZero() : before_(_mm_getcsr()) {
        constexpr unsigned flush_results = 0x8000, take_operands_for_zero = 0x0040;
        _mm_setcsr(before_ | flush_results | take_operands_for_zero);
    }
    ~DenormalsAreZero() { _mm_setcsr(before_); }
#else
    DenormalsAreZero() {}
#endif
    DenormalsAreZero(const DenormalsAreZero&) = delete;
    DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

  private:
#if defined(__SSE2__)
    unsigned before_;
#endif
};

}  // namespace detr_fast
