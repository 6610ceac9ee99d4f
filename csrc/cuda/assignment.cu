#include "assignment.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include "../core/dual_gap.h"
#include "../core/limits.h"
#include "../core/lsap.h"
#include "device_guard.h"
#include "shared_memory.h"

namespace detr_fast {
namespace {

// Counts travel as a kernel argument (4 KiB at most): no copy to wait for, and a graph captures them. A larger batch
// takes several launches.
constexpr int problems_per_launch = 896;

struct Counts {
    int32_t targets[problems_per_launch];
};

// Where a block keeps its problem. Shared memory if it fits, since the search waits for every read of it.
struct Placement {
    bool state_is_shared;
    bool tile_is_shared;
    bool tile_is_needed;  // else the cost is read where it lies
    size_t shared_bytes;
    size_t shared_limit;     // of the device
    size_t workspace_bytes;  // of one problem
};

template <typename Cost>
struct Batch {
    const Cost* cost;
    int64_t queries;
    int64_t targets;
    int64_t stride_problem;
    int64_t stride_query;
    int64_t stride_target;
    int64_t* query_of_target;
    int32_t* outcome;
    double* dual_gap;  // may be null
    unsigned char* workspace;
    Placement placement;
};

// Reads in the order of memory, so that neighbouring lanes read neighbouring costs; writes are cheap where they go.
template <typename Cost>
__device__ void copy_tile(Warp team, const Cost* from, int64_t row_stride, int64_t column_stride, int32_t rows,
                          int32_t columns, Cost* tile) {
    const bool columns_inner = column_stride <= row_stride;
    const int32_t inner = columns_inner ? columns : rows;
    const int64_t count = static_cast<int64_t>(rows) * columns;
    for (int64_t e = team.lane(); e < count; e += Warp::size) {
        const int64_t outer_index = e / inner;
        const int64_t inner_index = e - outer_index * inner;
        const int64_t i = columns_inner ? outer_index : inner_index;
        const int64_t j = columns_inner ? inner_index : outer_index;
        tile[i * columns + j] = from[i * row_stride + j * column_stride];
    }
}

// One warp a problem.
template <typename Cost>
__global__ void __launch_bounds__(Warp::size) assignment_kernel(const Batch<Cost> batch, const Counts counts) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const Warp team;
    const int64_t p = blockIdx.x;
    const int32_t targets = counts.targets[p];
    const bool rows_are_targets = targets < batch.queries;
    const auto queries = static_cast<int32_t>(batch.queries);
    const int32_t rows = rows_are_targets ? targets : queries;
    const int32_t columns = rows_are_targets ? queries : targets;
    const int64_t row_stride = rows_are_targets ? batch.stride_target : batch.stride_query;
    const int64_t column_stride = rows_are_targets ? batch.stride_query : batch.stride_target;

    unsigned char* workspace = batch.workspace + p * batch.placement.workspace_bytes;
    unsigned char* state = batch.placement.state_is_shared ? shared_memory : workspace;
    unsigned char* after_shared_state =
        shared_memory + (batch.placement.state_is_shared ? Assignment::bytes(rows, columns) : 0);
    unsigned char* after_workspace_state =
        workspace + (batch.placement.state_is_shared ? 0 : Assignment::bytes(rows, columns));
    auto* tile = reinterpret_cast<Cost*>(batch.placement.tile_is_shared ? after_shared_state : after_workspace_state);

    CostMatrix<Cost> cost{batch.cost + p * batch.stride_problem, row_stride, rows, columns};
    if (batch.placement.tile_is_needed) {
        copy_tile(team, cost.entries, row_stride, column_stride, rows, columns, tile);
        cost.entries = tile;
        cost.row_stride = columns;
    }
    team.sync();

    const Assignment a = Assignment::within(state, rows, columns);
    const Outcome outcome = solve_assignment(team, cost, a);
    const int32_t* match = rows_are_targets ? a.column_of_row : a.row_of_column;
    int64_t* out = batch.query_of_target + p * batch.targets;
    for (int64_t t = team.lane(); t < batch.targets; t += Warp::size) {
        out[t] = outcome == Outcome::solved && t < targets ? match[t] : -1;
    }
    if (team.lane() == 0) batch.outcome[p] = static_cast<int32_t>(outcome);
    if (batch.dual_gap == nullptr) return;
    const double gap = outcome == Outcome::solved
                           ? dual_gap(team, cost, a.column_of_row, a.row_of_column, a.column_price)
                           : Limits<double>::infinity;
    if (team.lane() == 0) batch.dual_gap[p] = gap;
}

// The sizes of the largest problem hold for all: rows and columns both grow with the number of targets.
Placement place(size_t cost_bytes, const int64_t sizes[3], const int64_t strides[3], const int64_t* num_targets,
                size_t shared_limit) {
    const int64_t queries = sizes[1];
    int64_t most = 0;
    int64_t fewest = queries;
    for (int64_t p = 0; p < sizes[0]; ++p) {
        most = std::max(most, num_targets[p]);
        fewest = std::min(fewest, num_targets[p]);
    }
    const size_t state = Assignment::bytes(std::min(most, queries), std::max(most, queries));
    const size_t tile = rounded(static_cast<size_t>(most * queries) * cost_bytes);
    const bool some_rows_are_targets = fewest < queries;
    const bool some_rows_are_queries = most >= queries;
    const bool readable_in_place =
        (!some_rows_are_targets || strides[1] == 1) && (!some_rows_are_queries || strides[2] == 1);
    Placement placement{};
    placement.shared_limit = shared_limit;
    placement.state_is_shared = state <= shared_limit;
    placement.tile_is_shared = state + tile <= shared_limit;
    placement.tile_is_needed = placement.tile_is_shared || !readable_in_place;
    placement.shared_bytes = (placement.state_is_shared ? state : 0) + (placement.tile_is_shared ? tile : 0);
    placement.workspace_bytes =
        (placement.state_is_shared ? 0 : state) + (placement.tile_is_needed && !placement.tile_is_shared ? tile : 0);
    return placement;
}

template <typename Cost>
cudaError_t launch(Batch<Cost> batch, int64_t problems, const int64_t* num_targets, cudaStream_t stream) {
    cudaError_t error = allow_shared_memory(assignment_kernel<Cost>, batch.placement.shared_limit);
    for (int64_t first = 0; first < problems && error == cudaSuccess; first += problems_per_launch) {
        const auto count = static_cast<unsigned>(std::min<int64_t>(problems_per_launch, problems - first));
        Counts counts{};
        std::copy_n(num_targets + first, count, counts.targets);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(count);
        config.blockDim = dim3(Warp::size);
        config.dynamicSmemBytes = batch.placement.shared_bytes;
        config.stream = stream;
        error = cudaLaunchKernelEx(&config, assignment_kernel<Cost>, static_cast<const Batch<Cost>>(batch),
                                   static_cast<const Counts>(counts));
        batch.cost += count * batch.stride_problem;
        batch.query_of_target += count * batch.targets;
        batch.outcome += count;
        batch.dual_gap += batch.dual_gap == nullptr ? 0 : count;
        batch.workspace += count * batch.placement.workspace_bytes;
    }
    return error;
}

template <typename Cost>
cudaError_t assign(const void* cost, const int64_t sizes[3], const int64_t strides[3], const int64_t* num_targets,
                   int64_t* query_of_target, int32_t* outcome, double* dual_gap, void* workspace, int device,
                   cudaStream_t stream) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    size_t shared_limit = 0;
    const cudaError_t error = shared_memory_limit(device, &shared_limit);
    if (error != cudaSuccess) return error;
    const Batch<Cost> batch{static_cast<const Cost*>(cost),
                            sizes[1],
                            sizes[2],
                            strides[0],
                            strides[1],
                            strides[2],
                            query_of_target,
                            outcome,
                            dual_gap,
                            static_cast<unsigned char*>(workspace),
                            place(sizeof(Cost), sizes, strides, num_targets, shared_limit)};
    return launch(batch, sizes[0], num_targets, stream);
}

}  // namespace
}  // namespace detr_fast

int64_t detr_fast_assignment_cuda_workspace(bool is_double, const int64_t sizes[3], const int64_t strides[3],
                                            const int64_t* num_targets, int device) {
    size_t shared_limit = 0;
    const cudaError_t error = detr_fast::shared_memory_limit(device, &shared_limit);
    if (error != cudaSuccess) return -static_cast<int64_t>(error);
    const size_t cost_bytes = is_double ? sizeof(double) : sizeof(float);
    const auto placement = detr_fast::place(cost_bytes, sizes, strides, num_targets, shared_limit);
    return sizes[0] * static_cast<int64_t>(placement.workspace_bytes);
}

int detr_fast_assignment_cuda(const void* cost, bool is_double, const int64_t sizes[3], const int64_t strides[3],
                              const int64_t* num_targets, int64_t* query_of_target, int32_t* outcome, double* dual_gap,
                              void* workspace, int device, void* stream) {
    const auto assign = is_double ? detr_fast::assign<double> : detr_fast::assign<float>;
    return assign(cost, sizes, strides, num_targets, query_of_target, outcome, dual_gap, workspace, device,
                  static_cast<cudaStream_t>(stream));
}

const char* detr_fast_cuda_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
