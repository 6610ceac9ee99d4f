// The assignment for problems whose rows all want the same columns, as those of an untrained model do: the cost is
// close to a number of the row plus a number of the column, and shortest paths from zero prices lead through nearly all
// rows.
//
// It starts from prices that such a cost would have at the optimum: how much a column's cheapest entry lies below the
// mean of its row, less that of the first column which is too dear. For squares with other costs it starts from the
// cheapest entries themselves. Columns not needed belong to a pool, which is one
// more row that costs nothing and has room for all of them; so every column must have an owner in the end, and any
// prices may be started from. Rows bid for columns (an auction without epsilon, as in R. Jonker and A. Volgenant, "A
// shortest augmenting path algorithm for dense and sparse linear assignment problems", Computing 38, 1987); shortest
// paths match what is left.
//
// Ties are not broken as SciPy does it. So the result counts only where there is no tie: its prices must prove that no
// other matching comes as near to its total as rounding could confuse.
//
// Processor time with AVX-512, float32, Q x T, row + column + 0.01 * noise, all three uniform, medians of whole calls
// that come here after a beginning with slot_lsap.h: 300x100 0.145 ms (slot_lsap.h alone 0.5, core/lsap.h 1.7),
// 900x300 1.6 ms (7.2, 36), 100x100 0.1 ms (0.55, 0.8). On uniform costs it is up to 30 times slower than slot_lsap.h.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "lanes.h"

namespace detr_fast {

template <typename Cost, int Bytes>
class PricedAssignment {
  public:
    static size_t bytes(int64_t rows, int64_t columns) {
        Layout layout{nullptr, 0};
        PricedAssignment({nullptr, 0, static_cast<int32_t>(rows), static_cast<int32_t>(columns)}, layout);
        return layout.used + Layout::alignment;
    }

    PricedAssignment(const CostMatrix<Cost>& cost, void* memory) : PricedAssignment(cost, Layout::at(memory)) {}

    // Whether rows are measured by their means: right where they want the same columns, wrong where they do not.
    // Returns whether it found the one best matching. No cost may be NaN.
    DETR_FAST_INLINE bool solve(bool from_means) {
        if (!set_prices(from_means)) return false;
        bid_for_columns();
        for (int32_t n = 0; n < num_free_rows_; ++n) {
            if (!augment(free_rows_[n])) return false;
        }
        for (; lost_by_pool_ > 0; --lost_by_pool_) {
            if (!augment(pool())) return false;
        }
        return is_unique();
    }

    const int32_t* column_of_row() const { return column_of_row_; }

    void write_prices(double* price) const { std::copy_n(column_price_, cost_.columns, price); }

  private:
    static constexpr int32_t lanes = Bytes / 8;  // doubles of a vector
    static constexpr double infinity = std::numeric_limits<double>::infinity();
    static constexpr int32_t nobody = -1;
    static constexpr int rounds_of_bids = 4;

    struct Bid {
        double first, second;  // the two cheapest entries of the row, less their columns' prices
        int32_t column;        // of the first
    };

    PricedAssignment(const CostMatrix<Cost>& cost, Layout&& layout) : PricedAssignment(cost, layout) {}

    PricedAssignment(const CostMatrix<Cost>& cost, Layout& layout) : cost_(cost) {
        const int64_t rows = cost.rows;
        const int64_t columns = cost.columns;
        const int64_t padded = (columns + lanes - 1) / lanes * lanes;
        layout.take(column_price_, padded);
        layout.take(distance_, padded);
        layout.take(owner_before_, padded);
        layout.take(closed_distance_, columns);
        layout.take(closed_price_, columns);
        layout.take(row_price_, rows + 1);
        layout.take(no_costs_, padded);
        layout.take(owner_, columns);
        layout.take(closed_column_, columns);
        layout.take(column_of_row_, rows + 1);
        layout.take(free_rows_, rows + 1);
        layout.take(first_edge_, rows + 2);
        layout.take(edges_to_, rows + 1);
        layout.take(edge_, most_edges());
        // The most extensions of paths that problems of this kind were seen to take, twice.
        patience_ = static_cast<int64_t>(cost.rows * (8 + 3 * std::sqrt(static_cast<double>(cost.rows))));
    }

    int32_t pool() const { return cost_.rows; }
    int64_t most_edges() const { return 4 * static_cast<int64_t>(cost_.columns) + 64; }
    DETR_FAST_INLINE const Cost* costs(int32_t i) const { return i == pool() ? no_costs_ : cost_.row(i); }

    // Calls look_at(a vector of the row's costs, first column). Behind the last column come zeros.
    template <typename LookAt>
    DETR_FAST_INLINE void for_each_vector(int32_t i, LookAt look_at) const {
        const Cost* row = costs(i);
        const int32_t whole = cost_.columns / lanes * lanes;
        for (int32_t j = 0; j < whole; j += lanes) look_at(load_doubles<Bytes>(row + j), j);
        if (whole == cost_.columns) return;
        Cost rest[lanes] = {};
        for (int32_t l = 0; l < cost_.columns - whole; ++l) rest[l] = row[whole + l];
        look_at(load_doubles<Bytes>(rest), whole);
    }

    // Returns whether all costs are finite.
    DETR_FAST_INLINE bool set_prices(bool from_means) {
        const int32_t columns = cost_.columns;
        double* __restrict__ price = column_price_;
        std::fill_n(price, columns, infinity);
        std::fill_n(no_costs_, columns, Cost(0));
        std::fill_n(owner_, columns, nobody);
        std::fill_n(column_of_row_, cost_.rows + 1, nobody);
        row_price_[pool()] = 0.0;
        lost_by_pool_ = 0;
        for (int32_t i = 0; i < cost_.rows; ++i) {
            const Cost* __restrict__ row = cost_.row(i);
            double sum = 0;
            DETR_FAST_PRAGMA(omp simd reduction(+ : sum))
            for (int32_t j = 0; j < columns; ++j) sum += row[j];
            if (!(std::fabs(sum) < infinity)) return false;
            const double mean = from_means ? sum / columns : 0.0;
            DETR_FAST_PRAGMA(omp simd)
            for (int32_t j = 0; j < columns; ++j) {
                const double d = row[j] - mean;
                price[j] = d < price[j] ? d : price[j];
            }
        }
        if (columns > cost_.rows) give_dear_columns_to_pool();
        for (int32_t j = columns; j % lanes != 0; ++j) price[j] = -infinity;
        return true;
    }

    DETR_FAST_INLINE void give_dear_columns_to_pool() {
        int32_t* order = closed_column_;
        for (int32_t j = 0; j < cost_.columns; ++j) order[j] = j;
        const double* price = column_price_;
        std::nth_element(order, order + cost_.rows, order + cost_.columns,
                         [=](int32_t a, int32_t b) { return price[a] < price[b]; });
        const double dear = price[order[cost_.rows]];
        for (int32_t k = 0; k < cost_.columns; ++k) {
            const int32_t j = order[k];
            column_price_[j] = k < cost_.rows ? price[j] - dear : 0.0;
            owner_[j] = k < cost_.rows ? nobody : pool();
        }
    }

    DETR_FAST_INLINE Bid best_bid(int32_t i) const {
        const double* __restrict__ price = column_price_;
        Doubles<Bytes> first = Doubles<Bytes>{} + infinity;
        Doubles<Bytes> second = first;
        Indices<Bytes> where{};
        const auto lane = numbered_lanes<Indices<Bytes>>();
        for_each_vector(i, [&](Doubles<Bytes> c, int32_t j) {
            const Doubles<Bytes> d = c - load<Doubles<Bytes>>(price + j);
            const Doubles<Bytes> other = d < first ? first : d;
            where = d < first ? lane + j : where;
            first = d < first ? d : first;
            second = other < second ? other : second;
        });
        Bid bid{first[0], second[0], static_cast<int32_t>(where[0])};
        for (int l = 1; l < lanes; ++l) {
            if (first[l] < bid.first) {
                bid = {first[l], std::min(bid.first, second[l]), static_cast<int32_t>(where[l])};
            } else {
                bid.second = std::min(bid.second, first[l]);
            }
        }
        return bid;
    }

    // A row takes its cheapest column, and pays so much more for it that its second one is as good.
    DETR_FAST_INLINE void bid_for_columns() {
        num_free_rows_ = cost_.rows;
        for (int32_t i = 0; i < cost_.rows; ++i) free_rows_[i] = i;
        for (int round = 0; round < rounds_of_bids; ++round) {
            int32_t bids = 2 * num_free_rows_;
            int32_t kept = 0;
            for (int32_t n = 0; n < num_free_rows_; ++n) {
                int32_t i = free_rows_[n];
                while (i != nobody && i != pool() && bids-- > 0) {
                    const int32_t displaced = bid(i);
                    if (displaced == i) break;
                    i = displaced;
                }
                if (i != nobody && i != pool()) free_rows_[kept++] = i;
            }
            num_free_rows_ = kept;
        }
        for (int32_t n = 0; n < num_free_rows_; ++n) row_price_[free_rows_[n]] = best_bid(free_rows_[n]).first;
    }

    // Returns who had the column, or the row itself where it stays free.
    DETR_FAST_INLINE int32_t bid(int32_t i) {
        const Bid best = best_bid(i);
        const int32_t owner = owner_[best.column];
        const bool pays = best.second > best.first && best.second < infinity;
        row_price_[i] = pays ? best.second : best.first;
        if (!pays && owner != nobody) return i;
        if (pays) column_price_[best.column] -= best.second - best.first;
        owner_[best.column] = i;
        column_of_row_[i] = best.column;
        lost_by_pool_ += owner == pool();
        return owner;
    }

    template <bool first>
    DETR_FAST_INLINE LowestLane extend_paths(int32_t i, double reached) {
        double* __restrict__ distance = distance_;
        int64_t* __restrict__ owner_before = owner_before_;
        const double* __restrict__ price = column_price_;
        const double shift = reached - row_price_[i];
        Doubles<Bytes> lowest = Doubles<Bytes>{} + infinity;
        Indices<Bytes> where{};
        const auto lane = numbered_lanes<Indices<Bytes>>();
        const Indices<Bytes> me = Indices<Bytes>{} + i;
        for_each_vector(i, [&](Doubles<Bytes> c, int32_t j) {
            Doubles<Bytes> d = c - load<Doubles<Bytes>>(price + j) + shift;
            if (first) {
                store(owner_before + j, me);
            } else {
                const Doubles<Bytes> before = load<Doubles<Bytes>>(distance + j);
                store(owner_before + j, d < before ? me : load<Indices<Bytes>>(owner_before + j));
                d = d < before ? d : before;
            }
            store(distance + j, d);
            where = d < lowest ? lane + j : where;
            lowest = d < lowest ? d : lowest;
        });
        return first_lowest<Bytes>(lowest, where);
    }

    DETR_FAST_INLINE void close(int32_t j, double reached) {
        closed_column_[num_closed_] = j;
        closed_distance_[num_closed_] = reached;
        closed_price_[num_closed_] = column_price_[j];
        ++num_closed_;
        column_price_[j] = -infinity;
        distance_[j] = infinity;
    }

    // All that the pool owns is as near as the pool.
    DETR_FAST_INLINE void close_pool(double reached) {
        for (int32_t j = 0; j < cost_.columns; ++j) {
            if (owner_[j] == pool() && column_price_[j] > -infinity) close(j, reached);
        }
    }

    // Gives the row, or the pool, one more column. Returns false where that takes too long.
    DETR_FAST_INLINE bool augment(int32_t start) {
        num_closed_ = 0;
        int32_t i = start;
        int32_t by_pool = nobody;  // the column by which the pool was reached
        double reached = 0;
        double pool_reached = start == pool() ? 0 : infinity;
        while (true) {
            if (i == pool()) close_pool(reached);
            const LowestLane nearest = i == start ? extend_paths<true>(i, reached) : extend_paths<false>(i, reached);
            if (!(nearest.value < infinity) || --patience_ < 0) return false;
            const auto j = static_cast<int32_t>(nearest.index);
            reached = std::max(reached, nearest.value);
            i = owner_[j];
            if (i == nobody) {
                update_prices(start, reached, pool_reached);
                follow_path(start, j, by_pool);
                return true;
            }
            close(j, reached);
            if (i == pool()) {
                by_pool = j;
                pool_reached = reached;
            }
        }
    }

    DETR_FAST_INLINE void update_prices(int32_t start, double length, double pool_reached) {
        for (int32_t k = 0; k < num_closed_; ++k) {
            const int32_t j = closed_column_[k];
            const double slack = length - closed_distance_[k];
            column_price_[j] = closed_price_[k] - slack;
            if (owner_[j] != pool()) row_price_[owner_[j]] += slack;
        }
        if (start != pool()) row_price_[start] += length;
        if (pool_reached < infinity) row_price_[pool()] += length - pool_reached;
    }

    DETR_FAST_INLINE void follow_path(int32_t start, int32_t end, int32_t by_pool) {
        int32_t j = end;
        while (true) {
            const auto i = static_cast<int32_t>(owner_before_[j]);
            owner_[j] = i;
            const int32_t freed = i == pool() ? by_pool : column_of_row_[i];
            column_of_row_[i] = j;
            if (i == start) return;
            j = freed;
        }
    }

    // Let each slack, cost less prices, be at least -rounding. A matching with a pair whose slack is above `tie` then
    // costs more than ours by tie - rows * rounding, while SciPy's sums err by less than rows * rounding. A matching
    // with all slacks below is an exchange along a circle of such pairs, and there is none.
    DETR_FAST_INLINE bool is_unique() {
        double largest = std::fabs(row_price_[pool()]);
        for (int32_t j = 0; j < cost_.columns; ++j) largest = std::max(largest, std::fabs(column_price_[j]));
        for (int32_t i = 0; i < cost_.rows; ++i) {
            const int32_t j = column_of_row_[i];
            const double entry = cost_.row(i)[j];
            row_price_[i] = entry - column_price_[j];
            largest = std::max(largest, std::max(std::fabs(row_price_[i]), std::fabs(entry)));
        }
        const double rounding = 16 * std::numeric_limits<double>::epsilon() * cost_.rows * largest;
        return find_edges(rounding, 2 * rounding * cost_.columns) && has_no_circle();
    }

    // From each row to the owners of columns that cost it no more than its own. Returns false where a slack is below
    // -rounding, where the pool has a column for more than its price, or where ties abound.
    DETR_FAST_INLINE bool find_edges(double rounding, double tie) {
        int64_t edges = 0;
        const int32_t owners = cost_.rows + (cost_.columns > cost_.rows);
        for (int32_t i = 0; i < owners; ++i) {
            first_edge_[i] = static_cast<int32_t>(edges);
            const Cost* __restrict__ row = costs(i);
            const double* __restrict__ price = column_price_;
            const double row_price = row_price_[i];
            int64_t tight = 0, sum = 0;
            DETR_FAST_PRAGMA(omp simd reduction(+ : tight, sum))
            for (int32_t j = 0; j < cost_.columns; ++j) {
                const bool is_tight = row[j] - price[j] - row_price <= tie;
                tight += is_tight ? int64_t{1} : int64_t{0};
                sum += is_tight ? int64_t{j} : int64_t{0};
            }
            if (tight == 1 && i != pool()) continue;
            if (tight == 2 && i != pool() && edges < most_edges()) {  // as a bid leaves it
                const auto other = static_cast<int32_t>(sum - column_of_row_[i]);
                if (row[other] - price[other] - row_price < -rounding) return false;
                edge_[edges++] = owner_[other];
                continue;
            }
            if (edges + tight > most_edges()) return false;
            for (int32_t j = 0; j < cost_.columns; ++j) {
                const double slack = row[j] - price[j] - row_price;
                if (slack < -rounding || (owner_[j] == i && slack > rounding)) return false;
                if (slack <= tie && owner_[j] != i) edge_[edges++] = owner_[j];
            }
        }
        for (int32_t i = owners; i <= cost_.rows + 1; ++i) first_edge_[i] = static_cast<int32_t>(edges);
        return true;
    }

    // Takes away one owner after another to whom no edge leads.
    DETR_FAST_INLINE bool has_no_circle() {
        const int32_t owners = cost_.rows + 1;
        int32_t* ready = free_rows_;
        int32_t found = 0;
        std::fill_n(edges_to_, owners, 0);
        for (int32_t e = 0; e < first_edge_[owners]; ++e) ++edges_to_[edge_[e]];
        for (int32_t i = 0; i < owners; ++i) {
            if (edges_to_[i] == 0) ready[found++] = i;
        }
        for (int32_t n = 0; n < found; ++n) {
            for (int32_t e = first_edge_[ready[n]]; e < first_edge_[ready[n] + 1]; ++e) {
                if (--edges_to_[edge_[e]] == 0) ready[found++] = edge_[e];
            }
        }
        return found == owners;
    }

    CostMatrix<Cost> cost_;
    int64_t patience_;
    int32_t num_free_rows_ = 0;
    int32_t lost_by_pool_ = 0;  // how many columns rows have taken from it
    int32_t num_closed_ = 0;

    // By column
    double* column_price_;   // -inf while the column is closed
    double* distance_;       // of the shortest path found so far; +inf once the column is closed
    int64_t* owner_before_;  // the row, or the pool, from which that path comes
    Cost* no_costs_;         // the pool's
    int32_t* owner_;         // a row, the pool, or nobody
    // By row, the pool's being the last
    double* row_price_;
    int32_t* column_of_row_;
    int32_t* free_rows_;
    int32_t* first_edge_;
    int32_t* edges_to_;
    int32_t* edge_;  // [most_edges()]
    // In the order of closing
    int32_t* closed_column_;
    double* closed_distance_;
    double* closed_price_;
};

}  // namespace detr_fast
