// The extremes of a type as constants: device code may read those, but not call std::numeric_limits' functions.

#pragma once

#include <limits>

namespace detr_fast {

template <typename Real>
struct Limits {
    static constexpr Real tiny = std::numeric_limits<Real>::min();  // the smallest positive normal number
    static constexpr Real infinity = std::numeric_limits<Real>::infinity();
    static constexpr Real epsilon = std::numeric_limits<Real>::epsilon();
    static constexpr Real not_a_number = std::numeric_limits<Real>::quiet_NaN();
};

}  // namespace detr_fast
