// One rectangular assignment problem, solved exactly: every row gets its own column at the lowest total cost.
//
// Shortest augmenting paths after D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE
// Transactions on Aerospace and Electronic Systems 52(4), 2016, with two additions:
//   - Where several columns are equally near, the choice is SciPy's (linear_sum_assignment 1.4 and later), so that the
//     indices, and not only the total, agree with it. For that every sum below has SciPy's order too.
//   - A row whose nearest column is still free takes it without a search. That is the path the search would find:
//   prices
//     of free columns are 0 and all others are at most 0, so no reduced cost lies below the row's minimum.
// Costs and prices are float64: with float32 prices rounding breaks the ties of duplicated targets.

#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "team.h"

namespace detr_fast {

enum class Outcome : int32_t {
    solved = 0,
    infeasible = 1,  // +inf forbids every way to give each row a column
    invalid = 2,     // a cost is NaN or -inf
};

template <typename Cost>
struct CostMatrix {  // rows <= columns; the columns of a row are contiguous
    const Cost* entries;
    int64_t row_stride;
    int32_t rows;
    int32_t columns;

    DETR_FAST_HD const Cost* row(int32_t i) const { return entries + i * row_stride; }
};

// What the solver writes: the matching, its prices (the dual solution), and the search in progress.
struct Assignment {
    double* row_price;        // [rows]
    double* column_price;     // [columns]; -inf while the column is closed, which takes it out of the search
    double* distance;         // [columns]: of the shortest path found so far; +inf once the column is closed
    double* closed_distance;  // [rows]: of the columns closed in this search, in the order of closing
    double* closed_price;     // [rows]
    int32_t* closed_column;   // [rows]
    int32_t* row_before;      // [columns]: the row from which the path reaches the column
    int32_t* scan_order;      // [columns]: the open columns in the order in which SciPy scans them
    int32_t* scan_position;   // [columns]: its inverse
    int32_t* row_of_column;   // [columns]; -1 where free
    int32_t* column_of_row;   // [rows]; -1 where free
    int32_t* nearest_column;  // [rows]: the first cheapest column, -1 where all are forbidden

    static DETR_FAST_HD size_t bytes(int64_t rows, int64_t columns) {
        const int64_t size = 8 * (3 * rows + 2 * columns) + 4 * (3 * rows + 4 * columns);
        return static_cast<size_t>((size + 15) / 16 * 16);
    }

    static DETR_FAST_HD Assignment within(void* memory, int64_t rows, int64_t columns) {
        Assignment a{};
        auto* doubles = static_cast<double*>(memory);
        a.row_price = doubles;
        a.closed_distance = a.row_price + rows;
        a.closed_price = a.closed_distance + rows;
        a.column_price = a.closed_price + rows;
        a.distance = a.column_price + columns;
        auto* integers = reinterpret_cast<int32_t*>(a.distance + columns);
        a.closed_column = integers;
        a.column_of_row = a.closed_column + rows;
        a.nearest_column = a.column_of_row + rows;
        a.row_before = a.nearest_column + rows;
        a.scan_order = a.row_before + columns;
        a.scan_position = a.scan_order + columns;
        a.row_of_column = a.scan_position + columns;
        return a;
    }
};

namespace lsap {

constexpr double infinity = std::numeric_limits<double>::infinity();

struct Path {
    double length;
    int32_t end;  // the free column it reaches, -1 where there is none
    int32_t columns_closed;
};

template <typename Team>
DETR_FAST_HD void clear(Team team, const Assignment& a, int32_t rows, int32_t columns) {
    for (int32_t i = team.lane(); i < rows; i += Team::size) {
        a.row_price[i] = 0.0;
        a.column_of_row[i] = -1;
    }
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        a.column_price[j] = 0.0;
        a.row_of_column[j] = -1;
        a.scan_order[j] = columns - 1 - j;
        a.scan_position[j] = columns - 1 - j;
    }
}

// Returns whether every cost is a number above -inf.
template <typename Team, typename Cost>
DETR_FAST_HD bool find_nearest_columns(Team team, const CostMatrix<Cost>& cost, const Assignment& a) {
    int32_t broken = 0;
    for (int32_t i = 0; i < cost.rows; ++i) {
        const Cost* row = cost.row(i);
        double lowest = infinity;
        DETR_FAST_SIMD_MIN(lowest)
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            lowest = row[j] < lowest ? row[j] : lowest;
        }
        lowest = team.min(lowest);
        int32_t first = -cost.columns;  // negative, so that max() finds the smallest index
        DETR_FAST_SIMD_MAX(first, broken)
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            const int32_t candidate = row[j] == lowest ? -j : -cost.columns;
            const int32_t bad = !(row[j] > -infinity);
            first = candidate > first ? candidate : first;
            broken = bad > broken ? bad : broken;
        }
        first = -team.max(first);
        if (team.lane() == 0) a.nearest_column[i] = lowest < infinity ? first : -1;
    }
    return team.max(broken) == 0;
}

template <typename Team, typename Cost>
DETR_FAST_HD bool take_nearest_column(Team team, const CostMatrix<Cost>& cost, const Assignment& a, int32_t i) {
    const int32_t j = a.nearest_column[i];
    if (j < 0 || a.row_of_column[j] >= 0) return false;
    team.sync();
    if (team.lane() == 0) {
        a.row_of_column[j] = i;
        a.column_of_row[i] = j;
        a.row_price[i] = cost.row(i)[j];
    }
    team.sync();
    return true;
}

// Lets paths go on from row i, which is `reached` away, and returns how far away the nearest open column is.
template <typename Team, typename Cost>
DETR_FAST_HD double extend_paths(Team team, const CostMatrix<Cost>& cost, const Assignment& a, int32_t i,
                                 double reached, bool first) {
    const Cost* __restrict__ row = cost.row(i);
    const double* __restrict__ column_price = a.column_price;
    double* __restrict__ distance = a.distance;
    int32_t* __restrict__ row_before = a.row_before;
    const double price = a.row_price[i];
    double lowest = infinity;
    if (first) {
        DETR_FAST_SIMD_MIN(lowest)
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            const double d = reached + row[j] - price - column_price[j];
            distance[j] = d;
            row_before[j] = i;
            lowest = d < lowest ? d : lowest;
        }
    } else {
        DETR_FAST_SIMD_MIN(lowest)
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            const double d = reached + row[j] - price - column_price[j];
            const double before = distance[j];
            const double after = d < before ? d : before;
            row_before[j] = d < before ? i : row_before[j];
            distance[j] = after;
            lowest = after < lowest ? after : lowest;
        }
    }
    return team.min(lowest);
}

// SciPy's choice among the columns at distance `lowest`: the free one it scans last, else the one it scans first.
template <typename Team>
DETR_FAST_HD int32_t choose_column(Team team, const Assignment& a, int32_t columns, double lowest) {
    constexpr int32_t free = 1 << 30;
    const double* __restrict__ distance = a.distance;
    int32_t best = 0;
    for (int32_t j = team.lane(); j < columns; j += Team::size) {
        if (distance[j] != lowest) continue;
        const int32_t rank = a.row_of_column[j] < 0 ? free + a.scan_position[j] : columns - a.scan_position[j];
        best = rank > best ? rank : best;
    }
    best = team.max(best);
    return a.scan_order[best >= free ? best - free : columns - best];
}

// SciPy fills the gap in its scan order with the order's last column.
DETR_FAST_HD void close_column(const Assignment& a, int32_t columns, int32_t j, int32_t columns_closed) {
    a.closed_column[columns_closed] = j;
    a.closed_distance[columns_closed] = a.distance[j];
    a.closed_price[columns_closed] = a.column_price[j];
    a.distance[j] = infinity;
    a.column_price[j] = -infinity;
    const int32_t last = a.scan_order[columns - 1 - columns_closed];
    a.scan_order[a.scan_position[j]] = last;
    a.scan_position[last] = a.scan_position[j];
}

// The closed column keeps its position while others fill the gap, so closing can be undone in reverse.
DETR_FAST_HD void reopen_column(const Assignment& a, int32_t columns, int32_t columns_closed) {
    const int32_t j = a.closed_column[columns_closed];
    const int32_t position = a.scan_position[j];
    const int32_t moved = a.scan_order[position];
    a.scan_position[moved] = columns - 1 - columns_closed;
    a.scan_order[columns - 1 - columns_closed] = moved;
    a.scan_position[j] = position;
    a.scan_order[position] = j;
}

template <typename Team, typename Cost>
DETR_FAST_HD Path find_path(Team team, const CostMatrix<Cost>& cost, const Assignment& a, int32_t start) {
    Path path{0.0, -1, 0};
    int32_t i = start;
    while (true) {
        path.length = extend_paths(team, cost, a, i, path.length, path.columns_closed == 0);
        if (!(path.length < infinity)) return path;
        const int32_t j = choose_column(team, a, cost.columns, path.length);
        team.sync();
        if (team.lane() == 0) close_column(a, cost.columns, j, path.columns_closed);
        path.columns_closed += 1;
        i = a.row_of_column[j];
        team.sync();
        if (i < 0) {
            path.end = j;
            return path;
        }
    }
}

// Crouse's steps 2 and 3, by lane 0: new prices on the closed part, then the pairs along the path are exchanged.
DETR_FAST_HD void follow_path(const Assignment& a, int32_t columns, int32_t start, const Path& path) {
    a.row_price[start] += path.length;
    for (int32_t k = path.columns_closed - 1; k >= 0; --k) {
        const int32_t j = a.closed_column[k];
        const double slack = path.length - a.closed_distance[k];
        a.column_price[j] = a.closed_price[k] - slack;
        if (a.row_of_column[j] >= 0) a.row_price[a.row_of_column[j]] += slack;
        reopen_column(a, columns, k);
    }
    int32_t j = path.end;
    int32_t i = -1;
    while (i != start) {
        i = a.row_before[j];
        const int32_t freed = a.column_of_row[i];
        a.row_of_column[j] = i;
        a.column_of_row[i] = j;
        j = freed;
    }
}

}  // namespace lsap

// All lanes see what it wrote when it returns `solved`.
template <typename Team, typename Cost>
DETR_FAST_HD Outcome solve_assignment(Team team, const CostMatrix<Cost>& cost, const Assignment& a) {
    lsap::clear(team, a, cost.rows, cost.columns);
    const bool valid = lsap::find_nearest_columns(team, cost, a);
    team.sync();  // for the writes above; a reduction does not order memory
    if (!valid) return Outcome::invalid;
    for (int32_t i = 0; i < cost.rows; ++i) {
        if (lsap::take_nearest_column(team, cost, a, i)) continue;
        const lsap::Path path = lsap::find_path(team, cost, a, i);
        if (path.end < 0) return Outcome::infeasible;
        if (team.lane() == 0) lsap::follow_path(a, cost.columns, i, path);
        team.sync();
    }
    return Outcome::solved;
}

}  // namespace detr_fast
