// The best bids of rows in an auction (core/auction.h), most of them without a look at all columns.
//
// A look at all of a row's columns leaves a few candidates, the cheapest column of every sixteenth, and a bound below
// which no other column was then. Prices rise from bid to bid, so the bound holds; while the two best candidates are
// within it, they are the two best of all columns. With uniform costs of 1000x1000 that answers three bids in four.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../core/auction.h"
#include "lanes.h"

namespace detr_fast {

#if defined(DETR_FAST_HAS_VECTORS)
template <typename Cost, int Bytes>
class CachedBidder {
  public:
    static size_t bytes(int64_t rows, int64_t columns) {
        Layout layout{nullptr, 0};
        CachedBidder({nullptr, 0, static_cast<int32_t>(rows), static_cast<int32_t>(columns)}, nullptr, layout);
        return layout.used + Layout::alignment;
    }

    CachedBidder(const CostMatrix<Cost>& cost, const double* price, void* memory)
        : CachedBidder(cost, price, Layout::at(memory)) {
        prices_fell();
    }

    DETR_FAST_INLINE auction::Bid best_bid(int32_t i) {
        if (!(bound_[i] > -infinity)) return look_at_all(i);
        const int32_t* __restrict__ column = candidate_ + i * candidates;
        const double* __restrict__ cost = candidate_cost_ + i * candidates;
        const double* __restrict__ price = price_;
        Best best;
        for (int v = 0; v < vectors; ++v) {
            double pays[lanes];
            int64_t where[lanes];
            DETR_FAST_PRAGMA(omp simd)
            for (int l = 0; l < lanes; ++l) {
                where[l] = column[lanes * v + l];
                pays[l] = cost[lanes * v + l] + price[column[lanes * v + l]];
            }
            best.add(load<Pays>(pays), load<Columns>(where));
        }
        const auction::Bid bid = best.of_lanes();
        return bid.second <= bound_[i] ? bid : look_at_all(i);
    }

    DETR_FAST_INLINE void prices_fell() { std::fill_n(bound_, cost_.rows, -infinity); }

  private:
    static constexpr double infinity = std::numeric_limits<double>::infinity();
    static constexpr int lanes = Bytes / 8;  // doubles of a vector
    static constexpr int candidates = 16;
    static constexpr int vectors = candidates / lanes;

    using Pays = Doubles<Bytes>;
    using Columns = Indices<Bytes>;

    // Of each lane.
    struct Best {
        Pays first = Pays{} + infinity;
        Pays second = Pays{} + infinity;
        Columns where{};  // the first

        DETR_FAST_INLINE void add(Pays pays, Columns column) {
            const Pays other = pays < first ? first : pays;
            where = pays < first ? column : where;
            first = pays < first ? pays : first;
            second = other < second ? other : second;
        }

        DETR_FAST_INLINE auction::Bid of_lanes() const {
            auction::Bid bid{first[0], second[0], static_cast<int32_t>(where[0])};
            for (int l = 1; l < lanes; ++l) {
                if (first[l] < bid.best) {
                    bid = {first[l], std::min(bid.best, second[l]), static_cast<int32_t>(where[l])};
                } else {
                    bid.second = std::min(bid.second, first[l]);
                }
            }
            return bid;
        }
    };

    CachedBidder(const CostMatrix<Cost>& cost, const double* price, Layout&& layout)
        : CachedBidder(cost, price, layout) {}

    CachedBidder(const CostMatrix<Cost>& cost, const double* price, Layout& layout) : cost_(cost), price_(price) {
        layout.take(bound_, cost.rows);
        layout.take(candidate_cost_, int64_t{cost.rows} * candidates);
        layout.take(candidate_, int64_t{cost.rows} * candidates);
    }

    DETR_FAST_INLINE auction::Bid look_at_all(int32_t i) {
        const auto lane = numbered_lanes<Columns>();
        const Cost* row = cost_.row(i);
        Best best[vectors];
        int32_t j = 0;
        for (; j + candidates <= cost_.columns; j += candidates) {
            for (int v = 0; v < vectors; ++v) {
                const int32_t k = j + lanes * v;
                best[v].add(load_doubles<Bytes>(row + k) + load<Pays>(price_ + k), lane + k);
            }
        }
        for (int v = 0; j < cost_.columns; j += lanes, ++v) {
            double pays[lanes];
            for (int l = 0; l < lanes; ++l) pays[l] = j + l < cost_.columns ? row[j + l] + price_[j + l] : infinity;
            best[v].add(load<Pays>(pays), lane + j);
        }
        return keep_candidates(i, best);
    }

    // A lane that saw no column is a candidate at an infinite cost.
    DETR_FAST_INLINE auction::Bid keep_candidates(int32_t i, const Best* best) {
        const Cost* row = cost_.row(i);
        Best all;
        Pays bound = Pays{} + infinity;
        for (int v = 0; v < vectors; ++v) {
            all.add(best[v].first, best[v].where);
            bound = best[v].second < bound ? best[v].second : bound;
            for (int l = 0; l < lanes; ++l) {
                const auto column = static_cast<int32_t>(best[v].where[l]);
                candidate_[i * candidates + lanes * v + l] = column;
                candidate_cost_[i * candidates + lanes * v + l] = best[v].first[l] < infinity ? row[column] : infinity;
            }
        }
        bound_[i] = bound[0];
        for (int l = 1; l < lanes; ++l) bound_[i] = std::min(bound_[i], bound[l]);
        all.second = bound < all.second ? bound : all.second;
        return all.of_lanes();
    }

    CostMatrix<Cost> cost_;
    const double* price_;     // [columns]
    double* bound_;           // [rows]; -inf where nothing is known
    double* candidate_cost_;  // [rows, candidates]
    int32_t* candidate_;      // [rows, candidates]
};
#endif

}  // namespace detr_fast
