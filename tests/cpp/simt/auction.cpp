// core/auction.h by a warp: the proof that its text is ready for a kernel. See cuda_runtime.h beside this file.

#include "../../../csrc/core/auction.h"

#include <cstring>
#include <vector>

#include "../../../csrc/core/dual_gap.h"

namespace detr_fast {
namespace {

alignas(16) unsigned char shared_memory[16];

const char* missing_file = "";
int missing_line = 0;

// Goes past one barrier, if a test says so.
struct TestedWarp : Warp {
    void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
        if (line != missing_line || std::strstr(file, missing_file) == nullptr) Warp::sync();
    }
};

__global__ void auction_kernel(const CostMatrix<double> cost, const Auction a, int32_t* outcome, double* gap) {
    const TestedWarp team;
    ScanningBidder<TestedWarp, double> bidder{team, cost, a.price};
    const Outcome ended = solve_by_auction(team, cost, a, bidder);
    if (team.lane() == 0) *outcome = static_cast<int32_t>(ended);
    if (ended != Outcome::solved) return;
    for (int32_t j = team.lane(); j < cost.columns; j += Warp::size) a.price[j] = -a.price[j];
    team.sync();
    const double found = dual_gap(team, cost, a.column_of_row, a.row_of_column, a.price);
    if (team.lane() == 0) *gap = found;
}

}  // namespace
}  // namespace detr_fast

unsigned char* simt::shared_memory = detr_fast::shared_memory;
size_t simt::shared_capacity = sizeof detr_fast::shared_memory;

extern "C" void simt_leave_out_barrier(const char* file, int line) {
    detr_fast::missing_file = file;
    detr_fast::missing_line = line;
}

// Solves a [rows, columns] problem that lies in one piece.
extern "C" void simt_auction(const double* cost, int32_t rows, int32_t columns, int32_t* column_of_row,
                             int32_t* outcome, double* gap) {
    std::vector<unsigned char> memory(detr_fast::Auction::bytes(rows, columns), 0x11);
    const auto a = detr_fast::Auction::within(memory.data(), rows, columns);
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(detr_fast::Warp::size);
    const detr_fast::CostMatrix<double> matrix{cost, columns, rows, columns};
    cudaLaunchKernelEx(&config, detr_fast::auction_kernel, matrix, a, outcome, gap);
    for (int32_t i = 0; i < rows; ++i) column_of_row[i] = a.column_of_row[i];
}
