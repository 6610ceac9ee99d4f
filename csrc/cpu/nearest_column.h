// The first cheapest entry of a row of costs, by whole vectors.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lanes.h"

namespace detr_fast {

template <typename Cost, int Bytes>
struct NearestColumn {
    using Costs = Vector<Cost, Bytes>;
    using Index = std::conditional_t<sizeof(Cost) == 4, int32_t, int64_t>;
    using Indices = Vector<Index, Bytes>;
    static constexpr int32_t width = sizeof(Costs) / sizeof(Cost);
    static constexpr Cost infinity = std::numeric_limits<Cost>::infinity();

    Cost cost;
    int32_t column;  // -1 where no cost is below +inf
    bool broken;     // a cost is NaN or -inf

    // Adds `taken`, which is 0 or +inf and goes on to a whole vector, where there is any.
    template <bool any_taken>
    static DETR_FAST_INLINE NearestColumn of(const Cost* row, const Cost* taken, int32_t columns) {
        Costs lowest = Costs{} + infinity;
        Indices where = Indices{} - 1;
        Indices broken{};
        const auto lane = numbered_lanes<Indices>();
        const auto look_at = [&](const Cost* costs, int32_t j) {
            auto x = load<Costs>(costs);
            if (any_taken) x += load<Costs>(taken + j);
            broken |= ~(x > -infinity);
            where = x < lowest ? lane + j : where;
            lowest = x < lowest ? x : lowest;
        };
        if (columns >= width) {
            for (int32_t j = 0; j <= columns - width; j += width) look_at(row + j, j);
            if (columns % width != 0) look_at(row + columns - width, columns - width);
        } else {
            Cost filled[width];
            for (int32_t l = 0; l < width; ++l) filled[l] = l < columns ? row[l] : infinity;
            look_at(filled, 0);
        }
        return first_of_lanes(lowest, where, broken);
    }

  private:
    static DETR_FAST_INLINE NearestColumn first_of_lanes(const Costs& lowest, const Indices& where,
                                                         const Indices& broken) {
        Cost lowest_of_lane[width];
        Index where_of_lane[width], broken_lane[width];
        store(lowest_of_lane, lowest);
        store(where_of_lane, where);
        store(broken_lane, broken);
        Cost cheapest = infinity;
        DETR_FAST_SIMD_MIN(cheapest)
        for (int32_t l = 0; l < width; ++l) cheapest = lowest_of_lane[l] < cheapest ? lowest_of_lane[l] : cheapest;
        Index first = std::numeric_limits<Index>::max();
        Index any_broken = 0;
        DETR_FAST_PRAGMA(omp simd reduction(min : first) reduction(| : any_broken))
        for (int32_t l = 0; l < width; ++l) {
            const Index candidate = lowest_of_lane[l] == cheapest ? where_of_lane[l] : first;
            first = candidate < first ? candidate : first;
            any_broken |= broken_lane[l];
        }
        return {cheapest, static_cast<int32_t>(cheapest < infinity ? first : -1), any_broken != 0};
    }
};

}  // namespace detr_fast
