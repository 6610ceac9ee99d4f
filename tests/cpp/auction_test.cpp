// csrc/core/auction.h and csrc/cpu/auction.cpp under sanitizers, against shortest paths.

#include "auction.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "assignment.h"
#include "cached_bidder.h"
#include "dual_gap.h"
#include "lsap.h"
#include "require.h"

using detr_fast::Assignment;
using detr_fast::Auction;
using detr_fast::CostMatrix;
using detr_fast::OneThread;
using detr_fast::Outcome;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

template <typename Cost>
double total(const CostMatrix<Cost>& cost, const int32_t* column_of_row) {
    double sum = 0;
    for (int32_t i = 0; i < cost.rows; ++i) sum += cost.row(i)[column_of_row[i]];
    return sum;
}

template <typename Cost>
std::vector<Cost> random_costs(std::mt19937& random, int round, size_t count) {
    std::vector<Cost> costs(count);
    for (Cost& cost : costs) {
        cost = static_cast<Cost>(random() % (round % 2 == 0 ? 4 : 1 << 20));
        if (round % 5 == 0 && random() % 4 == 0) cost = static_cast<Cost>(infinity);
    }
    return costs;
}

// Integers, so that both totals are the optimum, exactly.
template <typename Cost, typename Bidder>
void check(const CostMatrix<Cost>& cost, const Auction& a, Bidder& bidder) {
    std::vector<unsigned char> memory(Assignment::bytes(cost.rows, cost.columns), 0xff);
    const Assignment expected = Assignment::within(memory.data(), cost.rows, cost.columns);
    const Outcome outcome = detr_fast::solve_assignment(OneThread{}, cost, expected);
    require(detr_fast::solve_by_auction(OneThread{}, cost, a, bidder) == outcome, "the outcomes are the same");
    if (outcome != Outcome::solved) return;
    for (int32_t i = 0; i < cost.rows; ++i) require(a.row_of_column[a.column_of_row[i]] == i, "a column of its own");
    require(total(cost, a.column_of_row) == total(cost, expected.column_of_row), "the auction finds the optimum");
    for (int32_t j = 0; j < cost.columns; ++j) a.price[j] = -a.price[j];
    const double gap = detr_fast::dual_gap(OneThread{}, cost, a.column_of_row, a.row_of_column, a.price);
    require(gap >= 0 && gap < 1, "its prices prove it");
    const double exact =
        detr_fast::dual_gap(OneThread{}, cost, expected.column_of_row, expected.row_of_column, expected.column_price);
    require(exact == 0, "prices of shortest paths prove it without a gap");
}

template <typename Cost, int Bytes>
void test_bidders() {
    std::mt19937 random(std::random_device{}());
    for (int round = 0; round < 200; ++round) {
        const int rows = 1 + static_cast<int>(random() % 40);
        const int columns = rows + static_cast<int>(random() % (round % 3 == 0 ? 3 : 60));
        const auto costs = random_costs<Cost>(random, round, static_cast<size_t>(rows) * columns);
        const CostMatrix<Cost> cost{costs.data(), columns, rows, columns};
        // Exactly the bytes they ask for, so that AddressSanitizer sees a step beyond them.
        std::vector<unsigned char> memory(Auction::bytes(rows, columns), 0xff);
        const Auction a = Auction::within(memory.data(), rows, columns);
        detr_fast::ScanningBidder<OneThread, Cost> scanning{{}, cost, a.price};
        check(cost, a, scanning);
        std::vector<unsigned char> cache(detr_fast::CachedBidder<Cost, Bytes>::bytes(rows, columns), 0xff);
        detr_fast::CachedBidder<Cost, Bytes> cached(cost, a.price, cache.data());
        check(cost, a, cached);
    }
}

void test_batch_on_threads() {
    constexpr int64_t problems = 24, queries = 60, targets = 45;
    std::mt19937 random(7);
    const auto costs = random_costs<float>(random, 1, problems * queries * targets);
    const int64_t sizes[3] = {problems, queries, targets};
    const int64_t strides[3] = {queries * targets, targets, 1};
    std::vector<int64_t> num_targets(problems), by_one(problems * targets), by_four(problems * targets);
    std::vector<int32_t> outcome(problems);
    std::vector<double> gap(problems);
    for (int64_t p = 0; p < problems; ++p) num_targets[p] = p % (targets + 1);
    detr_fast_assignment_cpu(costs.data(), false, sizes, strides, num_targets.data(), true, by_one.data(),
                             outcome.data(), gap.data(), 1);
    detr_fast_assignment_cpu(costs.data(), false, sizes, strides, num_targets.data(), true, by_four.data(),
                             outcome.data(), gap.data(), 4);
    require(by_one == by_four, "threads change nothing");
    for (int64_t p = 0; p < problems; ++p) require(outcome[p] == 0 && gap[p] < 1, "every problem is solved");
}

}  // namespace

void test_auctions() {
    test_bidders<float, 16>();
    test_bidders<float, 64>();
    test_bidders<double, 32>();
    test_batch_on_threads();
}
