// The assignment of core/lsap.h for one thread: the same choices and the same sums, so the same indices, with searches
// that look only at matched columns.
//
// A search ends at the first free column it comes to, and free columns all have the price 0: of a row's free columns
// only the cheapest can be that end. So each row remembers its cheapest free column, and the columns a search walks
// over are those that are matched already. A matched column stays matched; it gets the next slot, and what a search
// reads of it (distance, price, and its costs, copied row by row when a search first comes to the row) lies by slots,
// one after another. Where rows are more than half as many as columns, most columns are matched when searches are long,
// and the column itself is the slot: nothing is copied, and a free column is closed.
//
// When the remembered column is taken, its cost is a lower bound for the row's others. They are looked through again
// only where that bound is as near as everything else.
//
// Processor time against core/lsap.h with AVX-512, float32, Q x T, the call from Python included, medians: 100x7 in
// 0.65 of it, uniform costs 300x100 0.45, 100x100 0.6, 1000x1000 0.43; integer ties 300x100 0.23; queries nearly alike
// 300x100 0.3 and 900x300 0.2. Below `smallest_square` columns core/lsap.h is quicker if rows are nearly as many.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "lanes.h"
#include "nearest_column.h"
#include "scan_order.h"

namespace detr_fast {

template <typename Cost, int Bytes>
class SlotAssignment {
  public:
    static constexpr int32_t smallest_square = 24;

    static bool is_quicker(int64_t rows, int64_t columns) { return columns >= smallest_square || 2 * rows <= columns; }

    static size_t bytes(int64_t rows, int64_t columns) {
        Layout layout{nullptr, 0};
        SlotAssignment(CostMatrix<Cost>{nullptr, 0, static_cast<int32_t>(rows), static_cast<int32_t>(columns)}, layout);
        return layout.used + Layout::alignment;
    }

    SlotAssignment(const CostMatrix<Cost>& cost, void* memory) : SlotAssignment(cost, Layout::at(memory)) {}

    // Returns whether every cost is a number above -inf.
    DETR_FAST_INLINE bool start() {
        clear();
        return find_nearest_columns();
    }

    // Goes on with the rows until all are matched (`solved`), one cannot be (`infeasible`), or a search ends after
    // paths were extended as often as `patience` says, when `paused` is set and it can be called again.
    DETR_FAST_INLINE Outcome match_rows(int64_t patience, bool& paused) {
        patience_ = patience;
        for (; next_row_ < cost_.rows; ++next_row_) {
            paused = patience_ < 0;
            if (paused) return Outcome::solved;
            const int32_t j = nearest_column_[next_row_];
            if (j >= 0 && is_free(j)) {
                row_price_[next_row_] = nearest_cost_[next_row_];
                match(next_row_, add_slot(j));
                continue;
            }
            const Path path = find_path(next_row_);
            if (path.end_column < 0) return Outcome::infeasible;
            follow_path(next_row_, path);
        }
        return Outcome::solved;
    }

    int32_t rows_matched() const { return next_row_; }

    // How many columns are the cheapest of a row: of uniform costs 63 % of the rows or more.
    DETR_FAST_INLINE int32_t columns_wanted() {
        std::fill_n(scan_.slot_of_column, cost_.columns, 0);
        int32_t wanted = 0;
        for (int32_t i = 0; i < cost_.rows; ++i) {
            if (nearest_column_[i] < 0 || scan_.slot_of_column[nearest_column_[i]] != 0) continue;
            scan_.slot_of_column[nearest_column_[i]] = 1;
            ++wanted;
        }
        return wanted;
    }

    // Whether most of the first rows, of which there are eight at least, have several cheapest columns.
    DETR_FAST_INLINE bool has_ties() const {
        constexpr int32_t looked_at = 8;
        int32_t tied = 0;
        for (int32_t i = 0; i < looked_at; ++i) {
            const Cost* row = cost_.row(i);
            tied += std::count(row, row + cost_.columns, nearest_cost_[i]) > 1;
        }
        return 2 * tied > looked_at;
    }

    // Once solved.
    DETR_FAST_INLINE const int32_t* column_of_row() {
        for (int32_t i = 0; i < cost_.rows; ++i) nearest_column_[i] = column_of_slot_[slot_of_row_[i]];
        return nearest_column_;
    }

    DETR_FAST_INLINE void write_prices(double* price) const {
        for (int32_t j = 0; j < cost_.columns; ++j) price[j] = 0.0;
        for (int32_t i = 0; i < cost_.rows; ++i) price[column_of_slot_[slot_of_row_[i]]] = price_[slot_of_row_[i]];
    }

  private:
    using Nearest = NearestColumn<Cost, Bytes>;

    static constexpr int32_t width = Nearest::width;
    static constexpr int32_t lanes = Bytes / 8;  // doubles of a vector
    static constexpr double infinity = std::numeric_limits<double>::infinity();
    static constexpr Cost forbidden = std::numeric_limits<Cost>::infinity();

    struct Path {
        double length;
        int32_t end_column, end_row, closed;
    };

    SlotAssignment(const CostMatrix<Cost>& cost, Layout&& layout) : SlotAssignment(cost, layout) {}

    SlotAssignment(const CostMatrix<Cost>& cost, Layout& layout) : cost_(cost) {
        const int64_t rows = cost.rows;
        const int64_t columns = cost.columns;
        direct_ = 2 * rows > columns;
        const int64_t slots = direct_ ? columns : rows;
        pitch_ = (slots + width - 1) / width * width;
        layout.take(price_, pitch_);
        layout.take(distance_, pitch_);
        layout.take(row_before_, pitch_);
        scan_.take(layout, columns, pitch_);
        layout.take(row_price_, rows);
        layout.take(reached_, rows + 1);
        layout.take(bound_, rows + 1);
        layout.take(closed_price_, rows);
        layout.take(taken_, (columns + width - 1) / width * width);
        layout.take(nearest_cost_, rows);
        layout.take(nearest_column_, rows);
        layout.take(slot_of_row_, rows);
        layout.take(row_of_slot_, slots);
        layout.take(column_of_slot_, slots);
        layout.take(copied_, rows);
        layout.take(closed_row_, rows + 1);
        layout.take(closed_slot_, rows);
        layout.take(stale_, rows + 1);
        layout.take(slot_costs_, direct_ ? 0 : rows * pitch_);
    }

    DETR_FAST_INLINE bool is_free(int32_t column) const { return taken_[column] == Cost(0); }

    DETR_FAST_INLINE void clear() {
        slots_ = direct_ ? cost_.columns : 0;
        next_row_ = 0;
        for (int32_t s = 0; s < slots_; ++s) column_of_slot_[s] = s;
        scan_.is_built = false;
        std::fill_n(price_, pitch_, -infinity);
        std::fill_n(row_price_, cost_.rows, 0.0);
        std::fill_n(copied_, cost_.rows, 0);
        std::fill_n(taken_, (cost_.columns + width - 1) / width * width, Cost(0));
    }

    // Returns whether every cost is a number above -inf.
    DETR_FAST_INLINE bool find_nearest_columns() {
        bool broken = false;
        for (int32_t i = 0; i < cost_.rows; ++i) {
            const Nearest nearest = Nearest::template of<false>(cost_.row(i), taken_, cost_.columns);
            broken |= nearest.broken;
            nearest_cost_[i] = nearest.cost;
            nearest_column_[i] = nearest.column;
        }
        return !broken;
    }

    DETR_FAST_INLINE int32_t add_slot(int32_t column) {
        const int32_t slot = direct_ ? column : slots_++;
        column_of_slot_[slot] = column;
        price_[slot] = 0.0;
        taken_[column] = forbidden;
        if (scan_.is_built) scan_.add_slot(slot, column);
        return slot;
    }

    DETR_FAST_INLINE void match(int32_t i, int32_t slot) {
        row_of_slot_[slot] = i;
        slot_of_row_[i] = slot;
    }

    // Filled up with zeros to whole vectors; prices of -inf keep a search from what has no column.
    DETR_FAST_INLINE const Cost* costs_of_slots(int32_t i) {
        if (direct_) return cost_.row(i);
        Cost* __restrict__ costs = slot_costs_ + i * pitch_;
        if (copied_[i] == slots_) return costs;
        const Cost* __restrict__ row = cost_.row(i);
        const int32_t* __restrict__ column = column_of_slot_;
        for (int32_t s = copied_[i]; s < slots_; ++s) {
            if (s % lanes == 0) std::fill_n(costs + s, lanes, Cost(0));
            costs[s] = row[column[s]];
        }
        copied_[i] = slots_;
        return costs;
    }

    // Lets paths go on from row i, which is `reached` away, to matched columns. Returns the distance and the place in
    // the scan order of the nearest.
    template <bool first>
    DETR_FAST_INLINE LowestLane extend_paths(int32_t i, double reached) {
        const Cost* __restrict__ costs = costs_of_slots(i);
        const double row_price = row_price_[i];
        const double* __restrict__ price = price_;
        double* __restrict__ distance = distance_;
        int64_t* __restrict__ row_before = row_before_;
        const int32_t slots = slots_;
        const int64_t* __restrict__ position = scan_.position_of_slot;
        constexpr int64_t beyond = std::numeric_limits<int64_t>::max();
        Doubles<Bytes> lowest = Doubles<Bytes>{} + infinity;
        Indices<Bytes> scanned = Indices<Bytes>{} + beyond;
        const Indices<Bytes> row = Indices<Bytes>{} + i;
        const auto look_at = [&](Doubles<Bytes> c, int32_t s) {
            Doubles<Bytes> d = reached + c - row_price - load<Doubles<Bytes>>(price + s);
            if (first) {
                store(row_before + s, row);
            } else {
                const Doubles<Bytes> before = load<Doubles<Bytes>>(distance + s);
                store(row_before + s, d < before ? row : load<Indices<Bytes>>(row_before + s));
                d = d < before ? d : before;
            }
            store(distance + s, d);
            const Indices<Bytes> here = load<Indices<Bytes>>(position + s);
            const Indices<Bytes> earlier = here < scanned ? here : scanned;
            scanned = d == lowest ? earlier : scanned;
            scanned = d < lowest ? here : scanned;
            lowest = d < lowest ? d : lowest;
        };
        const int32_t whole = direct_ ? slots / lanes * lanes : slots;
        for (int32_t s = 0; s < whole; s += lanes) look_at(load_doubles<Bytes>(costs + s), s);
        if (direct_ && whole < slots) {
            Cost rest[lanes] = {};
            for (int32_t l = 0; l < slots - whole; ++l) rest[l] = costs[whole + l];
            look_at(load_doubles<Bytes>(rest), whole);
        }
        return first_lowest<Bytes>(lowest, scanned);
    }

    // How far away the row closed k-th is from its cheapest free column, or less where that column was taken.
    DETR_FAST_INLINE double distance_of_free(int32_t k) const {
        const int32_t i = closed_row_[k];
        return reached_[k] + nearest_cost_[i] - row_price_[i];
    }

    DETR_FAST_INLINE Path find_path(int32_t start) {
        double lowest_free = infinity;   // distance of the nearest free column known
        double lowest_stale = infinity;  // lower bound for the others
        int32_t num_stale = 0, i = start;
        double reached = 0.0;
        if (!scan_.is_built) build_scan();
        for (int32_t k = 0;; ++k) {
            --patience_;
            closed_row_[k] = i;
            reached_[k] = reached;
            const LowestLane lowest = k == 0 ? extend_paths<true>(i, reached) : extend_paths<false>(i, reached);
            const int32_t j = nearest_column_[i];
            const double bound = bound_[k] = distance_of_free(k);
            if (j < 0 || is_free(j)) {
                lowest_free = bound < lowest_free ? bound : lowest_free;
            } else {
                stale_[num_stale++] = k;
                lowest_stale = bound < lowest_stale ? bound : lowest_stale;
            }
            if (lowest_stale <= lowest_free && lowest_stale <= lowest.value) {
                num_stale = renew(num_stale, lowest.value, lowest_free, lowest_stale);
            }
            if (lowest_free <= lowest.value) return end_of_path(lowest_free, k);
            const int32_t column = scan_.column_at[lowest.index];
            const int32_t slot = scan_.slot_of_column[column];
            scan_.close(column, k);
            closed_slot_[k] = slot;
            closed_price_[k] = price_[slot];
            distance_[slot] = infinity;
            price_[slot] = -infinity;
            i = row_of_slot_[slot];
            reached = lowest.value;
        }
    }

    // Finds the cheapest free columns of the rows whose bounds are as near as everything known; the others stay stale.
    DETR_FAST_INLINE int32_t renew(int32_t num_stale, double lowest_matched, double& lowest_free,
                                   double& lowest_stale) {
        int32_t kept = 0;
        lowest_stale = infinity;
        for (int32_t n = 0; n < num_stale; ++n) {
            const int32_t k = stale_[n];
            if (bound_[k] > lowest_free || bound_[k] > lowest_matched) {
                stale_[kept++] = k;
                lowest_stale = bound_[k] < lowest_stale ? bound_[k] : lowest_stale;
                continue;
            }
            const int32_t i = closed_row_[k];
            const Nearest nearest = Nearest::template of<true>(cost_.row(i), taken_, cost_.columns);
            nearest_cost_[i] = nearest.cost;
            nearest_column_[i] = nearest.column;
            bound_[k] = distance_of_free(k);
            lowest_free = bound_[k] < lowest_free ? bound_[k] : lowest_free;
        }
        return kept;
    }

    // Of the free columns that are `length` away, SciPy takes the one it scans last.
    DETR_FAST_INLINE Path end_of_path(double length, int32_t closed) const {
        if (!(length < infinity)) return {infinity, -1, -1, closed};
        int32_t last = -1;
        for (int32_t k = 0; k <= closed; ++k) {
            if (bound_[k] == length) last = std::max(last, last_scanned_at(length, k));
        }
        const int32_t column = scan_.column_at[last];
        int32_t k = 0;
        while (bound_[k] != length || distance_to(column, k) != length) ++k;
        return {length, column, closed_row_[k], closed};
    }

    DETR_FAST_INLINE double distance_to(int32_t column, int32_t k) const {
        const int32_t i = closed_row_[k];
        return reached_[k] + static_cast<double>(cost_.row(i)[column] + taken_[column]) - row_price_[i];
    }

    // Of the free columns that are `length` away by the row closed k-th.
    DETR_FAST_INLINE int32_t last_scanned_at(double length, int32_t k) const {
        const int32_t i = closed_row_[k];
        const Cost* __restrict__ row = cost_.row(i);
        const Cost* __restrict__ taken = taken_;
        const int32_t* __restrict__ position = scan_.position_of_column;
        const double reached = reached_[k], row_price = row_price_[i];
        int32_t last = -1;
        DETR_FAST_SIMD_MAX(last)
        for (int32_t j = 0; j < cost_.columns; ++j) {
            const double d = reached + static_cast<double>(row[j] + taken[j]) - row_price;
            const int32_t candidate = d == length ? position[j] : -1;
            last = candidate > last ? candidate : last;
        }
        return last;
    }

    DETR_FAST_INLINE void build_scan() {
        scan_.build();
        for (int32_t s = 0; s < slots_; ++s) scan_.add_slot(s, column_of_slot_[s]);
    }

    DETR_FAST_INLINE void follow_path(int32_t start, const Path& path) {
        row_price_[start] += path.length;
        for (int32_t k = path.closed - 1; k >= 0; --k) {
            const int32_t s = closed_slot_[k];
            scan_.reopen(column_of_slot_[s], k);
            const double slack = path.length - reached_[k + 1];
            price_[s] = closed_price_[k] - slack;
            row_price_[row_of_slot_[s]] += slack;
        }
        int32_t slot = add_slot(path.end_column);
        int32_t i = path.end_row;
        while (true) {
            const int32_t freed = slot_of_row_[i];
            match(i, slot);
            if (i == start) return;
            slot = freed;
            i = static_cast<int32_t>(row_before_[slot]);
        }
    }

    CostMatrix<Cost> cost_;
    int64_t pitch_;
    bool direct_;
    int64_t patience_ = 0;
    int32_t next_row_ = 0;
    int32_t slots_ = 0;
    ScanOrder scan_;

    // By slot
    double* price_;        // -inf while the column is closed, and where there is none
    double* distance_;     // of the shortest path found so far; +inf once the column is closed
    int64_t* row_before_;  // the row from which that path comes
    int32_t* row_of_slot_;
    int32_t* column_of_slot_;
    // By row
    double* row_price_;
    Cost* nearest_cost_;
    int32_t* nearest_column_;  // the cheapest column among those that were free when it was looked for, -1 for none
    int32_t* slot_of_row_;
    int32_t* copied_;   // how many slots' costs were copied
    Cost* slot_costs_;  // [rows, slots]
    // By column
    Cost* taken_;  // 0 where free, +inf where matched
    // In the order of closing
    int32_t* closed_row_;   // the first is the one where the search starts
    double* reached_;       // how far away the row is
    double* bound_;         // lower bound for the distance of its nearest free column
    int32_t* closed_slot_;  // the slot that led to the next row
    double* closed_price_;  // of that slot's column
    int32_t* stale_;        // those of which the bound is not the distance itself
};

}  // namespace detr_fast
