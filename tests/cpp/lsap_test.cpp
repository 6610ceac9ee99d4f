// csrc/core/lsap.h and csrc/cpu under sanitizers: random problems whose result is checked by its own dual prices, and
// many threads at once. Exits with 0 where all is well.

#include "lsap.h"

#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "assignment.h"
#include "priced_lsap.h"
#include "require.h"
#include "slot_lsap.h"
#include "thread_pool.h"

using detr_fast::Assignment;
using detr_fast::CostMatrix;
using detr_fast::Outcome;

namespace {

std::vector<double> random_costs(std::mt19937& random, int rows, int columns, bool ties) {
    std::vector<double> costs(static_cast<size_t>(rows) * columns);
    std::uniform_real_distribution<double> any(-1.0, 1.0);
    for (double& cost : costs) cost = ties ? static_cast<double>(random() % 3) : any(random);
    return costs;
}

// Feasible prices with no slack on matched pairs prove the matching optimal.
void check_certificate(const CostMatrix<double>& cost, const Assignment& a) {
    constexpr double rounding = 1e-12;
    for (int j = 0; j < cost.columns; ++j) {
        require(a.column_price[j] <= rounding, "column prices are at most 0");
        require(a.row_of_column[j] >= 0 || a.column_price[j] == 0.0, "a free column costs nothing");
        require(a.scan_order[a.scan_position[j]] == j, "the scan order is whole");
        require(a.scan_position[j] == cost.columns - 1 - j, "every closed column was opened again");
    }
    for (int i = 0; i < cost.rows; ++i) {
        const int match = a.column_of_row[i];
        require(match >= 0 && a.row_of_column[match] == i, "every row has a column of its own");
        for (int j = 0; j < cost.columns; ++j) {
            const double slack = cost.row(i)[j] - a.row_price[i] - a.column_price[j];
            require(slack >= -rounding, "no pair is cheaper than its prices");
            require(j != match || slack <= rounding, "a matched pair costs its prices");
        }
    }
}

void test_certificates() {
    std::mt19937 random(std::random_device{}());
    for (int round = 0; round < 400; ++round) {
        const int rows = 1 + static_cast<int>(random() % 30);
        const int columns = rows + static_cast<int>(random() % 30);
        const auto costs = random_costs(random, rows, columns, round % 2 == 0);
        const CostMatrix<double> cost{costs.data(), columns, rows, columns};
        // Exactly the bytes it asks for, so that AddressSanitizer sees a step beyond them.
        std::vector<unsigned char> memory(Assignment::bytes(rows, columns), 0xff);
        const Assignment a = Assignment::within(memory.data(), rows, columns);
        require(detr_fast::solve_assignment(detr_fast::OneThread{}, cost, a) == Outcome::solved, "it is solved");
        check_certificate(cost, a);
    }
}

// The solvers of the CPU against the one text for all devices, which makes the same choices.
template <typename Cost, int Bytes>
void test_quicker_solvers(int rounds) {
    std::mt19937 random(std::random_device{}());
    int unique = 0;
    for (int round = 0; round < rounds; ++round) {
        const int rows = 1 + static_cast<int>(random() % 40);
        const int columns = rows + static_cast<int>(random() % (round % 3 == 0 ? 3 : 120));
        auto costs = random_costs(random, rows, columns, round % 2 == 0);
        for (double& cost : costs) {
            if (round % 5 == 0 && random() % 4 == 0) cost = std::numeric_limits<double>::infinity();
        }
        const std::vector<Cost> entries(costs.begin(), costs.end());
        const CostMatrix<Cost> cost{entries.data(), columns, rows, columns};
        std::vector<unsigned char> expected_memory(Assignment::bytes(rows, columns), 0xff);
        const Assignment expected = Assignment::within(expected_memory.data(), rows, columns);
        const Outcome expected_outcome = detr_fast::solve_assignment(detr_fast::OneThread{}, cost, expected);

        // Exactly the bytes it asks for here too.
        std::vector<unsigned char> memory(detr_fast::SlotAssignment<Cost, Bytes>::bytes(rows, columns), 0xff);
        detr_fast::SlotAssignment<Cost, Bytes> found(cost, memory.data());
        require(found.start(), "every cost is a number");
        bool paused = true;
        Outcome outcome = Outcome::solved;
        while (paused && outcome == Outcome::solved) outcome = found.match_rows(random() % 100, paused);
        require(outcome == expected_outcome, "both solvers come to the same outcome");
        if (outcome != Outcome::solved) continue;
        const int32_t* column_of_row = found.column_of_row();
        for (int i = 0; i < rows; ++i) require(column_of_row[i] == expected.column_of_row[i], "the columns agree");

        std::vector<unsigned char> priced_memory(detr_fast::PricedAssignment<Cost, Bytes>::bytes(rows, columns), 0xff);
        detr_fast::PricedAssignment<Cost, Bytes> priced(cost, priced_memory.data());
        if (!priced.solve(random() % 2 == 0)) continue;
        ++unique;
        column_of_row = priced.column_of_row();
        for (int i = 0; i < rows; ++i) require(column_of_row[i] == expected.column_of_row[i], "the one best is found");
    }
    require(unique > rounds / 6, "problems without ties have one best matching");
}

std::vector<int64_t> solve_batch(const std::vector<double>& costs, int threads) {
    constexpr int64_t problems = 48, queries = 60, targets = 25;
    const int64_t sizes[3] = {problems, queries, targets};
    const int64_t strides[3] = {queries * targets, targets, 1};
    std::vector<int64_t> num_targets(problems), query_of_target(problems * targets);
    std::vector<int32_t> outcome(problems);
    for (int64_t p = 0; p < problems; ++p) num_targets[p] = p % (targets + 1);
    detr_fast_assignment_cpu(costs.data(), true, sizes, strides, num_targets.data(), false, query_of_target.data(),
                             outcome.data(), nullptr, threads);
    for (const int32_t o : outcome) require(o == 0, "every problem of the batch is solved");
    return query_of_target;
}

void test_callers_at_once() {
    std::mt19937 random(7);
    const auto costs = random_costs(random, 48 * 60, 25, false);
    const auto expected = solve_batch(costs, 1);
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([&] {
            for (int i = 0; i < 20; ++i)
                require(solve_batch(costs, 4) == expected, "callers do not disturb each other");
        });
    }
    for (std::thread& caller : callers) caller.join();
}

void test_exceptions_reach_the_caller() {
    for (int i = 0; i < 50; ++i) {
        bool caught = false;
        try {
            detr_fast::parallel_for(100, 4, [](int64_t index) {
                if (index == 57) throw std::runtime_error("57");
            });
        } catch (const std::runtime_error& error) {
            caught = std::string(error.what()) == "57";
        }
        require(caught, "an exception of a task reaches the caller");
    }
}

}  // namespace

void test_auctions();  // auction_test.cpp

int main() {
    test_certificates();
    test_quicker_solvers<float, 16>(150);
    test_quicker_solvers<float, 32>(150);
    test_quicker_solvers<float, 64>(600);
    test_quicker_solvers<double, 64>(600);
    test_callers_at_once();
    test_exceptions_reach_the_caller();
    test_auctions();
    return 0;
}
