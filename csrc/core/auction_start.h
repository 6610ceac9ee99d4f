// What an auction starts with: the first prices, the first and the last epsilon, and whether all rows can be matched.
// See auction.h for the auction itself.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "limits.h"
#include "lsap.h"
#include "team.h"

namespace detr_fast {

// What the solver writes: the matching and its prices, and the auction in progress.
struct Auction {
    double* price;           // [columns]: those of lsap.h, negated
    double* pays;            // [rows]: cost and price of the row's column, while columns bid for rows
    int32_t* row_of_column;  // [columns]; -1 where free
    int32_t* column_of_row;  // [rows]; -1 where free
    int32_t* waiting;        // [columns]: a stack of free rows, or of free columns that are too dear
    int32_t* row_before;     // [columns]: of the search for any matching at all
    int32_t* reached_for;    // [columns]: the row for which that search came to the column

    static DETR_FAST_HD size_t bytes(int64_t rows, int64_t columns) {
        const int64_t size = 8 * (rows + columns) + 4 * (rows + 4 * columns);
        return static_cast<size_t>((size + 15) / 16 * 16);
    }

    static DETR_FAST_HD Auction within(void* memory, int64_t rows, int64_t columns) {
        Auction a{};
        a.price = static_cast<double*>(memory);
        a.pays = a.price + columns;
        a.column_of_row = reinterpret_cast<int32_t*>(a.pays + rows);
        a.row_of_column = a.column_of_row + rows;
        a.waiting = a.row_of_column + columns;
        a.row_before = a.waiting + columns;
        a.reached_for = a.row_before + columns;
        return a;
    }
};

namespace auction {

constexpr double infinity = Limits<double>::infinity;
// From one epsilon to the next; a power of two keeps them multiples of the last one.
constexpr double scaling = 8.0;
// The first epsilon, in means of what a row's costs spread over by the number of columns.
constexpr double spreads = 8.0;
// The finest epsilon by the largest cost: sums are exact up to 2^7 times the largest cost.
constexpr double finest = 1.0 / static_cast<double>(int64_t{1} << 46);
constexpr double largest_cost = 1e300;  // beyond it sums might not be finite

// Of finite costs, but for the last two.
struct Costs {
    double largest;     // absolute value
    double spread;      // the highest less the lowest
    double in_rows;     // the mean over rows of how far the highest is from the lowest, the first prices taken off
    double unit;        // the largest power of two of which all are multiples; +inf where all are 0
    int32_t broken;     // 1 where any is NaN, -inf or too large
    int32_t forbidden;  // 1 where any is +inf
};

// The largest power of two of which x, a finite number but not 0, is a multiple.
DETR_FAST_HD double unit_of(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint64_t without_lowest = (bits << 12) == 0 ? 0 : bits & (bits - 1);
    double rest;
    std::memcpy(&rest, &without_lowest, sizeof(rest));
    return x < rest ? rest - x : x - rest;
}

// Adds a row to what is known of the costs; each lane has its own part. Returns the lowest cost.
template <typename Team, typename Cost>
DETR_FAST_HD double look_at_row(Team team, const Cost* __restrict__ row, int32_t columns, Costs& costs,
                                double& highest) {
    double lowest = infinity, negated = -highest, unit = costs.unit;
    DETR_FAST_SIMD_MIN(lowest, negated, unit)
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        const double c = row[j];
        const double n = c < infinity ? -c : infinity;
        const double u = c < infinity && c != 0 ? unit_of(c) : infinity;
        lowest = c < lowest ? c : lowest;
        negated = n < negated ? n : negated;
        unit = u < unit ? u : unit;
    }
    int32_t broken = costs.broken, forbidden = costs.forbidden;
    DETR_FAST_SIMD_MAX(broken, forbidden)
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        const int32_t bad = !(row[j] >= -largest_cost && (row[j] <= largest_cost || row[j] == infinity));
        const int32_t no = row[j] == infinity;
        broken = bad > broken ? bad : broken;
        forbidden = no > forbidden ? no : forbidden;
    }
    highest = -negated;
    costs.unit = unit;
    costs.broken = broken;
    costs.forbidden = forbidden;
    return team.min(lowest);
}

// Sets the first prices: a column is the dearer, the further its costs are below those of its rows in other columns
// (the column reduction of lsap.h's kin), so that a number added to all costs of a column changes nothing.
template <typename Team, typename Cost>
DETR_FAST_HD Costs look_at_costs(Team team, const CostMatrix<Cost>& cost, const Auction& a) {
    Costs costs{0.0, 0.0, 0.0, infinity, 0, 0};
    double lowest = infinity, highest = -infinity;
    double* __restrict__ price = a.price;
    for (int32_t j = team.lane(); j < cost.columns; j += Team::size) price[j] = -infinity;
    for (int32_t i = 0; i < cost.rows; ++i) {
        const Cost* __restrict__ row = cost.row(i);
        const double lowest_of_row = look_at_row(team, row, cost.columns, costs, highest);
        lowest = lowest_of_row < lowest ? lowest_of_row : lowest;
        double furthest = 0.0;
        DETR_FAST_SIMD_MIN(furthest)
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            const double below = lowest_of_row - row[j];
            price[j] = below > price[j] ? below : price[j];
            const double distance = below > -infinity ? below - price[j] : 0.0;
            furthest = distance < furthest ? distance : furthest;
        }
        costs.in_rows -= team.min(furthest) / cost.rows;
    }
    highest = -team.min(-highest);
    costs.largest = highest > -lowest ? highest : -lowest;
    costs.spread = highest - lowest;
    costs.unit = team.min(costs.unit);
    costs.broken = team.max(costs.broken);
    costs.forbidden = team.max(costs.forbidden);
    return costs;
}

// Only as many columns as there are rows will be taken: about the dearest ones. The others get one price, the lowest.
template <typename Team>
DETR_FAST_HD void level_prices(Team team, const Auction& a, int32_t rows, int32_t columns) {
    double low = 0.0;  // of prices, which are at most 0
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        if (!(a.price[j] > -infinity)) a.price[j] = 0.0;  // of a column that is forbidden to all
        low = a.price[j] < low ? a.price[j] : low;
    }
    if (rows == columns) return;
    low = team.min(low);
    double high = 0.0;
    for (int halving = 0; halving < 30; ++halving) {
        const double middle = low + (high - low) / 2;
        double above = 0.0;
        for (int32_t j = team.lane(); j < columns; j += Team::size) above += a.price[j] > middle ? 1.0 : 0.0;
        (team.sum(above) > rows ? low : high) = middle;
    }
    double level = infinity;  // one of the prices, since sums of other numbers might not be exact
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        level = a.price[j] >= low && a.price[j] < level ? a.price[j] : level;
    }
    level = team.min(level);
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        a.price[j] = a.price[j] > level ? a.price[j] : level;
    }
}

template <typename Team>
DETR_FAST_HD void clear(Team team, const Auction& a, int32_t rows, int32_t columns) {
    for (int32_t i = team.lane(); i < rows; i += Team::size) a.column_of_row[i] = -1;
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        a.row_of_column[j] = -1;
        a.reached_for[j] = -1;
    }
    team.sync();
}

// Finds a column for row `start` among those that are not forbidden, breadth first, or says that there is none.
template <typename Cost>
DETR_FAST_HD bool find_any_column(const CostMatrix<Cost>& cost, const Auction& a, int32_t start) {
    int32_t* queue = a.waiting;
    queue[0] = start;
    int32_t queued = 1;
    for (int32_t next = 0; next < queued; ++next) {
        const Cost* row = cost.row(queue[next]);
        for (int32_t j = 0; j < cost.columns; ++j) {
            if (a.reached_for[j] == start || !(row[j] < infinity)) continue;
            a.reached_for[j] = start;
            a.row_before[j] = queue[next];
            if (a.row_of_column[j] >= 0) {
                queue[queued++] = a.row_of_column[j];
                continue;
            }
            while (j >= 0) {
                const int32_t i = a.row_before[j];
                const int32_t freed = a.column_of_row[i];
                a.row_of_column[j] = i;
                a.column_of_row[i] = j;
                j = freed;
            }
            return true;
        }
    }
    return false;
}

// By lane 0. Bids for a column that nobody can have would go on for ever, so whether all rows can be matched is asked
// first, where anything is forbidden.
template <typename Team, typename Cost>
DETR_FAST_HD bool can_match(Team team, const CostMatrix<Cost>& cost, const Auction& a) {
    int32_t stuck = 0;
    if (team.lane() == 0) {
        for (int32_t i = 0; i < cost.rows && stuck == 0; ++i) stuck = !find_any_column(cost, a, i);
    }
    return team.max(stuck) == 0;
}

DETR_FAST_HD double last_epsilon(const Costs& costs, int32_t rows) {
    double epsilon = costs.unit < infinity ? costs.unit : 0.0;
    for (int64_t n = 1; n <= rows; n *= 2) epsilon /= 2;
    epsilon = epsilon > Limits<double>::tiny ? epsilon : Limits<double>::tiny;
    while (epsilon < costs.largest * finest) epsilon *= 2;
    return epsilon;
}

DETR_FAST_HD double first_epsilon(const Costs& costs, int32_t columns, double last) {
    double epsilon = last;
    while (epsilon < costs.in_rows * spreads / columns) epsilon *= scaling;
    return epsilon;
}

}  // namespace auction
}  // namespace detr_fast
