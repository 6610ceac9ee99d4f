#include "assignment.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../core/dual_gap.h"
#include "../core/lsap.h"
#include "priced_lsap.h"
#include "slot_lsap.h"
#include "solver.h"
#include "thread_pool.h"
#include "transpose.h"
#include "widths.h"

namespace detr_fast {

namespace {

#if defined(DETR_FAST_HAS_VECTORS)
// For solvers that keep their prices otherwise. Not for speed: only reports want the gap.
template <typename Cost, typename Solver>
double gap_of(const CostMatrix<Cost>& cost, const Solver& solver, const int32_t* column_of_row) {
    std::vector<double> column_price(cost.columns);
    std::vector<int32_t> row_of_column(cost.columns, -1);
    for (int32_t i = 0; i < cost.rows; ++i) row_of_column[column_of_row[i]] = i;
    solver.write_prices(column_price.data());
    return dual_gap(OneThread{}, cost, column_of_row, row_of_column.data(), column_price.data());
}
#endif

// `wide` is the cost, or the cost with forbidden columns behind it.
template <typename Cost>
Outcome solve_by_columns(const CostMatrix<Cost>& cost, const CostMatrix<Cost>& wide, bool rows_are_targets,
                         void* memory, int64_t* query_of_target, double* gap) {
    const Assignment a = Assignment::within(memory, wide.rows, wide.columns);
    const Outcome outcome = solve_assignment(OneThread{}, wide, a);
    if (outcome != Outcome::solved) return outcome;
    write_matching(a.column_of_row, cost, rows_are_targets, query_of_target);
    if (gap != nullptr) *gap = dual_gap(OneThread{}, cost, a.column_of_row, a.row_of_column, a.column_price);
    return outcome;
}

// Columns of the smallest problems. With forbidden columns up to here, which change no choice, loops have no ends that
// fill no vector, and the compiler knows how long they are: uniform costs of 10x10 take 0.8 microseconds less.
constexpr int32_t few_columns = 16;

template <typename Cost>
Outcome solve_few_columns(const CostMatrix<Cost>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
                          double* gap) {
    Cost padded[few_columns * few_columns];
    std::fill_n(padded, cost.rows * few_columns, std::numeric_limits<Cost>::infinity());
    for (int32_t i = 0; i < cost.rows; ++i) std::copy_n(cost.row(i), cost.columns, padded + i * few_columns);
    const CostMatrix<Cost> wide{padded, few_columns, cost.rows, few_columns};
    return solve_by_columns(cost, wide, rows_are_targets, memory, query_of_target, gap);
}

#if defined(DETR_FAST_HAS_VECTORS)
// Where the prices start: at zero (slot_lsap.h), or from the costs (priced_lsap.h).
enum class Start { zero, row_means, cheapest_entries };

// Zero is quickest where few rows compete for a column, or ties abound. Row means may be where all want the same.
// Cheapest entries are in squares, in which each column is somebody's in the end: uniform costs of 100x100 take 34
// microseconds for 66, 1000x1000 4.2 milliseconds for 9.5.
template <typename Slots, typename Cost>
DETR_FAST_INLINE Start quickest_start(Slots& slots, const CostMatrix<Cost>& cost) {
    if (cost.rows < 8) return Start::zero;
    const int64_t wanted = slots.columns_wanted();
    const bool is_contested_square = cost.rows == cost.columns && 10 * wanted < 9 * int64_t{cost.rows};
    if (2 * wanted >= cost.rows && !is_contested_square) return Start::zero;
    if (slots.has_ties()) return Start::zero;
    return 2 * wanted < cost.rows ? Start::row_means : Start::cheapest_entries;
}

// Where rows want the same columns, searches from zero begin with this many extensions of paths for each row.
constexpr int64_t extensions_on_trial = 2;

// Whether they led through more than a quarter of the rows matched so far. Nearly all, where a cost is a number of the
// row plus a number of the column; a fifth where queries say nearly the same, whose 900x300 take 1.8 milliseconds from
// zero and 6 from row means.
template <typename Slots, typename Cost>
DETR_FAST_INLINE bool searches_are_long(const Slots& slots, const CostMatrix<Cost>& cost) {
    const int64_t matched = slots.rows_matched();
    return matched * matched < 4 * 2 * extensions_on_trial * cost.rows;
}

template <int Bytes, typename Cost>
Outcome solve_by_slots(const CostMatrix<Cost>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
                       double* gap) {
    using Slots = SlotAssignment<Cost, Bytes>;
    constexpr int64_t forever = std::numeric_limits<int64_t>::max();
    Slots slots(cost, memory);
    if (!slots.start()) return Outcome::invalid;
    const Start start = quickest_start(slots, cost);
    bool paused = start == Start::cheapest_entries;
    Outcome outcome = Outcome::solved;
    if (!paused) {
        outcome = slots.match_rows(start == Start::row_means ? extensions_on_trial * cost.rows : forever, paused);
    }
    if (paused && start == Start::row_means && !searches_are_long(slots, cost)) {
        outcome = slots.match_rows(forever, paused);
    }
    if (paused) {
        auto* after_slots = static_cast<unsigned char*>(memory) + Slots::bytes(cost.rows, cost.columns);
        PricedAssignment<Cost, Bytes> priced(cost, after_slots);
        if (priced.solve(start == Start::row_means)) {
            write_matching(priced.column_of_row(), cost, rows_are_targets, query_of_target);
            if (gap != nullptr) *gap = gap_of(cost, priced, priced.column_of_row());
            return Outcome::solved;
        }
        outcome = slots.match_rows(forever, paused);
    }
    if (outcome == Outcome::solved) {
        const int32_t* column_of_row = slots.column_of_row();
        write_matching(column_of_row, cost, rows_are_targets, query_of_target);
        if (gap != nullptr) *gap = gap_of(cost, slots, column_of_row);
    }
    return outcome;
}
#endif

template <typename Cost>
struct Solve {
    const CostMatrix<Cost>& cost;
    bool rows_are_targets;
    void* memory;
    int64_t* query_of_target;
    double* gap;

    template <int Bytes>
    Outcome run() const {
#if defined(DETR_FAST_HAS_VECTORS)
        if (SlotAssignment<Cost, Bytes>::is_quicker(cost.rows, cost.columns)) {
            return solve_by_slots<Bytes>(cost, rows_are_targets, memory, query_of_target, gap);
        }
#endif
        if (cost.columns <= few_columns) {
            return solve_few_columns(cost, rows_are_targets, memory, query_of_target, gap);
        }
        return solve_by_columns(cost, cost, rows_are_targets, memory, query_of_target, gap);
    }
};

template <typename Cost>
size_t memory_for(int64_t rows, int64_t columns) {
    size_t bytes = Assignment::bytes(rows, std::max<int64_t>(columns, few_columns));
#if defined(DETR_FAST_HAS_VECTORS)
    const size_t slots = SlotAssignment<Cost, widest_vector_bytes>::bytes(rows, columns);
    bytes = std::max(bytes, slots + PricedAssignment<Cost, widest_vector_bytes>::bytes(rows, columns));
#endif
    return bytes;
}

}  // namespace

size_t solver_memory(bool is_double, int64_t rows, int64_t columns) {
    return is_double ? memory_for<double>(rows, columns) : memory_for<float>(rows, columns);
}

Outcome solve(const CostMatrix<float>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
              double* gap) {
    return with_widest_vectors(Solve<float>{cost, rows_are_targets, memory, query_of_target, gap});
}

Outcome solve(const CostMatrix<double>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
              double* gap) {
    return with_widest_vectors(Solve<double>{cost, rows_are_targets, memory, query_of_target, gap});
}

namespace {

// Fewer costs than this are done before another thread has woken up (about 20 microseconds).
constexpr int64_t costs_worth_a_thread = 1 << 15;

struct Batch {
    int64_t queries;
    int64_t targets;  // of the widest problem
    int64_t strides[3];
    const int64_t* num_targets;
    int64_t* query_of_target;
    int32_t* outcome;
    double* dual_gap;  // may be null
    bool by_auction;
};

// Rows of a copy whose columns are contiguous are so long, that whole vectors can be written.
int64_t packed_row(int64_t columns) {
    constexpr int64_t most_lanes = widest_vector_bytes / sizeof(float);
    return (columns + most_lanes - 1) / most_lanes * most_lanes;
}

// Copies a matrix. Number by number, down its columns, 1000x1000 takes 1.3 milliseconds, eight times what its
// assignment may take; in squares 0.3.
template <typename Cost>
struct PackRows {
    const CostMatrix<Cost>& matrix;
    int64_t column_stride;
    Cost* packed;  // [rows, packed_row(columns)]

    template <int Bytes>
    void run() const {
        const int64_t row = packed_row(matrix.columns);
        if constexpr (sizeof(Cost) == sizeof(float)) {
            if (matrix.row_stride == 1) {
                pack_transposed<Bytes>(matrix.entries, column_stride, matrix.columns, matrix.rows, row, 1.0f, packed);
                return;
            }
        }
        constexpr int64_t square = 16;
        for (int64_t first = 0; first < matrix.columns; first += square) {
            const int64_t end = std::min<int64_t>(first + square, matrix.columns);
            for (int64_t i = 0; i < matrix.rows; ++i) {
                const Cost* from = matrix.entries + i * matrix.row_stride;
                for (int64_t j = first; j < end; ++j) packed[i * row + j] = from[j * column_stride];
            }
        }
    }
};

// A problem's rows are its targets, or its queries where these are not more: SciPy's choice, which ties depend on.
template <typename Cost>
void solve_problem(const Batch& batch, const Cost* cost, int64_t p) {
    const int64_t targets = batch.num_targets[p];
    const bool rows_are_targets = targets < batch.queries;
    const int64_t rows = rows_are_targets ? targets : batch.queries;
    const int64_t columns = rows_are_targets ? batch.queries : targets;
    const int64_t row_stride = batch.strides[rows_are_targets ? 2 : 1];
    const int64_t column_stride = batch.strides[rows_are_targets ? 1 : 2];
    int64_t* out = batch.query_of_target + p * batch.targets;
    std::fill(out, out + batch.targets, -1);
    batch.outcome[p] = static_cast<int32_t>(Outcome::solved);
    if (batch.dual_gap != nullptr) batch.dual_gap[p] = 0.0;
    if (rows == 0) return;

    static thread_local Scratch scratch;
    constexpr bool is_double = sizeof(Cost) == sizeof(double);
    const bool in_place = column_stride == 1;
    const size_t state = (batch.by_auction ? auction_memory : solver_memory)(is_double, rows, columns);
    const size_t tile = in_place ? 0 : static_cast<size_t>(rows * packed_row(columns)) * sizeof(Cost);
    unsigned char* memory = scratch.reserve(state + tile);
    CostMatrix<Cost> matrix{cost + p * batch.strides[0], row_stride, static_cast<int32_t>(rows),
                            static_cast<int32_t>(columns)};
    if (!in_place) {
        auto* packed = reinterpret_cast<Cost*>(memory + state);
        with_widest_vectors(PackRows<Cost>{matrix, column_stride, packed});
        matrix.entries = packed;
        matrix.row_stride = packed_row(columns);
    }

    double* gap = batch.dual_gap == nullptr ? nullptr : batch.dual_gap + p;
    const Outcome outcome = batch.by_auction ? solve_by_auction(matrix, rows_are_targets, memory, out, gap)
                                             : solve(matrix, rows_are_targets, memory, out, gap);
    batch.outcome[p] = static_cast<int32_t>(outcome);
    if (gap != nullptr && outcome != Outcome::solved) *gap = std::numeric_limits<double>::infinity();
    scratch.release_if_large();
}

template <typename Cost>
void solve_batch(const Batch& batch, const Cost* cost, int64_t problems, int threads) {
    int64_t costs = 0;
    for (int64_t p = 0; p < problems; ++p) costs += batch.num_targets[p] * batch.queries;
    parallel_for(problems, std::min(threads, detr_fast_assignment_cpu_threads(costs)),
                 [&](int64_t p) { solve_problem(batch, cost, p); });
}

}  // namespace
}  // namespace detr_fast

int detr_fast_assignment_cpu_threads(int64_t costs) {
    constexpr int64_t most = std::numeric_limits<int>::max();
    return static_cast<int>(std::min(most, 1 + costs / detr_fast::costs_worth_a_thread));
}

void detr_fast_assignment_cpu(const void* cost, bool is_double, const int64_t sizes[3], const int64_t strides[3],
                              const int64_t* num_targets, bool by_auction, int64_t* query_of_target, int32_t* outcome,
                              double* dual_gap, int threads) {
    const detr_fast::Batch batch{sizes[1],    sizes[2],        {strides[0], strides[1], strides[2]},
                                 num_targets, query_of_target, outcome,
                                 dual_gap,    by_auction};
    if (is_double) {
        detr_fast::solve_batch(batch, static_cast<const double*>(cost), sizes[0], threads);
    } else {
        detr_fast::solve_batch(batch, static_cast<const float*>(cost), sizes[0], threads);
    }
}
