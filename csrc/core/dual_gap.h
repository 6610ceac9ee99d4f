// How good a matching is for sure: the distance of its total from the lower bound that column prices prove.
//
// Column prices are those of lsap.h: what a column lies below zero. Let v be prices of at most 0 (any, where rows and
// columns are as many), and u the least of a row's costs less v. Then no matching's total is below the sum of all u and
// v (weak duality). The distance is a sum of numbers that are at least 0, with no large ones to cancel: what each row
// pays above its least, and the prices of free columns.

#pragma once

#include <cstdint>

#include "limits.h"
#include "lsap.h"
#include "team.h"

namespace detr_fast {

// `column_price` may be the prices of all columns plus a constant. Of a matching with all rows matched.
template <typename Team, typename Cost>
DETR_FAST_HD double dual_gap(Team team, const CostMatrix<Cost>& cost, const int32_t* column_of_row,
                             const int32_t* row_of_column, const double* column_price) {
    constexpr double infinity = Limits<double>::infinity;
    double highest = infinity;  // of the matched columns' prices, negated
    for (int32_t i = team.lane(); i < cost.rows; i += Team::size) {
        const double price = -column_price[column_of_row[i]];
        highest = price < highest ? price : highest;
    }
    highest = -team.min(highest);
    double unused = 0.0;
    for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
        const double price = column_price[j] - highest;
        unused += row_of_column[j] < 0 && price < 0 ? -price : 0.0;
    }
    double gap = team.sum(unused);
    for (int32_t i = 0; i < cost.rows; ++i) {
        const Cost* __restrict__ row = cost.row(i);
        double least = infinity;
        DETR_FAST_SIMD_MIN(least)
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            const double price = column_price[j] - highest;
            const double pays = row[j] - (price < 0 ? price : 0.0);
            least = pays < least ? pays : least;
        }
        const double price = column_price[column_of_row[i]] - highest;
        gap += row[column_of_row[i]] - price - team.min(least);
    }
    return gap;
}

}  // namespace detr_fast
