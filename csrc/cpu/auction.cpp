#include "../core/auction.h"

#include "../core/dual_gap.h"
#include "cached_bidder.h"
#include "solver.h"
#include "widths.h"

namespace detr_fast {

namespace {

template <typename Cost>
size_t memory_for(int64_t rows, int64_t columns) {
    size_t bytes = Auction::bytes(rows, columns);
#if defined(DETR_FAST_HAS_VECTORS)
    bytes += CachedBidder<Cost, widest_vector_bytes>::bytes(rows, columns);
#endif
    return bytes;
}

template <typename Cost>
struct SolveByAuction {
    const CostMatrix<Cost>& cost;
    bool rows_are_targets;
    void* memory;
    int64_t* query_of_target;
    double* gap;

    template <int Bytes>
    Outcome run() const {
        const Auction a = Auction::within(memory, cost.rows, cost.columns);
#if defined(DETR_FAST_HAS_VECTORS)
        auto* after_state = static_cast<unsigned char*>(memory) + Auction::bytes(cost.rows, cost.columns);
        CachedBidder<Cost, Bytes> bidder(cost, a.price, after_state);
#else
        ScanningBidder<OneThread, Cost> bidder{{}, cost, a.price};
#endif
        const Outcome outcome = solve_by_auction(OneThread{}, cost, a, bidder);
        if (outcome != Outcome::solved) return outcome;
        write_matching(a.column_of_row, cost, rows_are_targets, query_of_target);
        if (gap == nullptr) return outcome;
        for (int32_t j = 0; j < cost.columns; ++j) a.price[j] = -a.price[j];
        *gap = dual_gap(OneThread{}, cost, a.column_of_row, a.row_of_column, a.price);
        return outcome;
    }
};

}  // namespace

size_t auction_memory(bool is_double, int64_t rows, int64_t columns) {
    return is_double ? memory_for<double>(rows, columns) : memory_for<float>(rows, columns);
}

Outcome solve_by_auction(const CostMatrix<float>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
                         double* gap) {
    return with_widest_vectors(SolveByAuction<float>{cost, rows_are_targets, memory, query_of_target, gap});
}

Outcome solve_by_auction(const CostMatrix<double>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
                         double* gap) {
    return with_widest_vectors(SolveByAuction<double>{cost, rows_are_targets, memory, query_of_target, gap});
}

}  // namespace detr_fast
