// One rectangular assignment problem by auction: rows bid for columns until each has one, at prices that prove how good
// the matching is.
//
// Forward and reverse auction with epsilon scaling after D. P. Bertsekas and D. A. Castanon, "A forward/reverse auction
// algorithm for asymmetric assignment problems", Computational Optimization and Applications 1, 1992, for costs instead
// of benefits. A row pays its cost and its column's price, and no more than epsilon above the least it could pay. When
// all rows have a column and no free column is dearer than one that is taken, the total is at most rows * epsilon above
// the optimum. Forward, a row raises the price of its best column until the second best is as good, and epsilon more.
// Reverse, a free column that is too dear lowers its price until a row comes. That is done for one epsilon after
// another; prices of one are where the next begins.
//
// Let all finite costs be multiples of q, a power of two. The last epsilon is the largest power of two below q / rows,
// so that the matching is the best one. It is as if costs were integers times rows + 1 and epsilon 1: costs, prices and
// their sums are multiples of epsilon, and float64 has them exactly up to 2^53 epsilon. Where that is not enough for
// the size of the costs (`finest`), epsilon is larger, and the total within rows * epsilon of the optimum.

#pragma once

#include <cstdint>

#include "auction_start.h"
#include "limits.h"
#include "lsap.h"
#include "team.h"

namespace detr_fast {

namespace auction {

struct Bid {
    double best;     // the least that the row can pay: a cost and a price
    double second;   // the least in another column
    int32_t column;  // of the best
};

// Rows that pay more than epsilon above the least they could have to bid again. Returns how many wait.
template <typename Team, typename Cost, typename Bidder>
DETR_FAST_HD int32_t release_rows(Team team, const CostMatrix<Cost>& cost, const Auction& a, Bidder& bidder,
                                  double epsilon) {
    int32_t waiting = 0;
    for (int32_t i = cost.rows - 1; i >= 0; --i) {
        const int32_t j = a.column_of_row[i];
        const bool stays = j >= 0 && cost.row(i)[j] + a.price[j] <= bidder.best_bid(i).best + epsilon;
        if (stays) continue;
        if (team.lane() == 0) {
            if (j >= 0) a.row_of_column[j] = -1;
            a.column_of_row[i] = -1;
            a.waiting[waiting] = i;
        }
        ++waiting;
    }
    team.sync();
    return waiting;
}

// Forward: free rows bid until there are none. Epsilon grows with a price that would outgrow its sums' exactness.
template <typename Team, typename Bidder>
DETR_FAST_HD void bid_for_columns(Team team, const Auction& a, Bidder& bidder, double spread, int32_t waiting,
                                  double& epsilon) {
    while (waiting > 0) {
        const int32_t i = a.waiting[waiting - 1];
        const Bid bid = bidder.best_bid(i);
        const int32_t j = bid.column;
        const double price = a.price[j] + (bid.second < infinity ? bid.second - bid.best : spread) + epsilon;
        const int32_t displaced = a.row_of_column[j];
        team.sync();
        if (team.lane() == 0) {
            a.price[j] = price;
            a.row_of_column[j] = i;
            a.column_of_row[i] = j;
            if (displaced >= 0) a.column_of_row[displaced] = -1;
            if (displaced >= 0) a.waiting[waiting - 1] = displaced;
        }
        if (displaced < 0) --waiting;
        while (price * Limits<double>::epsilon > epsilon / 2) epsilon *= 2;
        team.sync();
    }
}

// What the rows would pay for the column rather than stay with theirs: the most, and who; and the most of the others.
template <typename Team, typename Cost>
DETR_FAST_HD Bid best_offer(Team team, const CostMatrix<Cost>& cost, const Auction& a, int32_t column) {
    double best = infinity, second = infinity;  // negated, for min()
    int32_t row = -1;
    for (int32_t i = team.lane(); i < cost.rows; i += Team::size) {
        const double offer = cost.row(i)[column] - a.pays[i];
        second = offer < best ? best : (offer < second ? offer : second);
        row = offer < best ? i : row;
        best = offer < best ? offer : best;
    }
    const double best_of_all = team.min(best);
    row = team.max(best == best_of_all ? row : -1);
    const bool is_mine = row >= 0 && row % Team::size == team.lane();
    return {-best_of_all, -team.min(is_mine ? second : best), row};
}

struct DearColumns {
    double level;     // the lowest price of a taken column
    int32_t waiting;  // how many free ones are dearer
};

template <typename Team, typename Cost>
DETR_FAST_HD DearColumns find_dear_columns(Team team, const CostMatrix<Cost>& cost, const Auction& a) {
    DearColumns dear{infinity, 0};
    for (int32_t i = team.lane(); i < cost.rows; i += Team::size) {
        const int32_t j = a.column_of_row[i];
        a.pays[i] = cost.row(i)[j] + a.price[j];
        dear.level = a.price[j] < dear.level ? a.price[j] : dear.level;
    }
    dear.level = team.min(dear.level);
    for (int32_t j = 0; j < cost.columns; ++j) {
        if (a.row_of_column[j] >= 0 || a.price[j] <= dear.level) continue;
        if (team.lane() == 0) a.waiting[dear.waiting] = j;
        ++dear.waiting;
    }
    team.sync();
    return dear;
}

// Reverse: free columns that are dearer than a taken one lower their prices until a row comes, or they are not dearer.
// Returns whether any did.
template <typename Team, typename Cost>
DETR_FAST_HD bool bid_for_rows(Team team, const CostMatrix<Cost>& cost, const Auction& a, double epsilon) {
    const DearColumns dear = find_dear_columns(team, cost, a);
    int32_t waiting = dear.waiting;
    while (waiting > 0) {
        const int32_t j = a.waiting[waiting - 1];
        const Bid offer = best_offer(team, cost, a, j);
        const int32_t i = offer.column;
        const bool comes = offer.best > dear.level + epsilon;
        const int32_t freed = comes ? a.column_of_row[i] : -1;
        const bool freed_is_dear = comes && a.price[freed] > dear.level;
        const double price = offer.second - epsilon > dear.level && comes ? offer.second - epsilon : dear.level;
        team.sync();
        if (team.lane() == 0) {
            a.price[j] = price;
            if (comes) {
                a.row_of_column[freed] = -1;
                a.row_of_column[j] = i;
                a.column_of_row[i] = j;
                a.pays[i] = cost.row(i)[j] + price;
            }
            if (freed_is_dear) a.waiting[waiting - 1] = freed;
        }
        if (!freed_is_dear) --waiting;
        team.sync();
    }
    return dear.waiting > 0;
}

}  // namespace auction

// Finds the least that a row can pay by looking at all columns.
template <typename Team, typename Cost>
struct ScanningBidder {
    Team team;
    CostMatrix<Cost> cost;
    const double* price;

    DETR_FAST_HD auction::Bid best_bid(int32_t i) const {
        const Cost* row = cost.row(i);
        double best = auction::infinity, second = auction::infinity;
        int32_t column = -1;
        for (int32_t j = team.lane(); j < cost.columns; j += Team::size) {
            const double pays = row[j] + price[j];
            second = pays < best ? best : (pays < second ? pays : second);
            column = pays < best ? j : column;
            best = pays < best ? pays : best;
        }
        const double best_of_all = team.min(best);
        column = team.max(best == best_of_all ? column : -1);
        const bool is_mine = column >= 0 && column % Team::size == team.lane();
        return {best_of_all, team.min(is_mine ? second : best), column};
    }

    DETR_FAST_HD void prices_fell() {}
};

// All lanes see what it wrote when it returns `solved`. The bidder reads a.price, and its prices_fell() is called when
// they did; otherwise they rise.
template <typename Team, typename Cost, typename Bidder>
DETR_FAST_HD Outcome solve_by_auction(Team team, const CostMatrix<Cost>& cost, const Auction& a, Bidder& bidder) {
    const auction::Costs costs = auction::look_at_costs(team, cost, a);
    if (costs.broken != 0) return Outcome::invalid;
    auction::clear(team, a, cost.rows, cost.columns);
    if (costs.forbidden != 0) {
        if (!auction::can_match(team, cost, a)) return Outcome::infeasible;
        team.sync();  // for what lane 0 wrote; a reduction does not order memory
        auction::clear(team, a, cost.rows, cost.columns);
    }
    auction::level_prices(team, a, cost.rows, cost.columns);
    const double last = auction::last_epsilon(costs, cost.rows);
    double epsilon = auction::first_epsilon(costs, cost.columns, last);
    while (true) {
        const double wanted = epsilon;
        const int32_t waiting = auction::release_rows(team, cost, a, bidder, epsilon);
        auction::bid_for_columns(team, a, bidder, costs.spread, waiting, epsilon);
        if (cost.columns > cost.rows && auction::bid_for_rows(team, cost, a, epsilon)) bidder.prices_fell();
        if (epsilon > wanted || epsilon <= last) return Outcome::solved;
        epsilon /= auction::scaling;
    }
}

}  // namespace detr_fast
