#include "matching.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "../core/half_types.h"
#include "../core/limits.h"
#include "../core/lsap.h"
#include "../core/pair_cost.h"
#include "device_guard.h"
#include "matching_batch.h"
#include "shared_memory.h"

namespace detr_fast {
namespace {

// The costs of 100 queries and 7 targets are 28 units of work for a warp. The solver after them uses one warp only.
constexpr int warps = 8;
constexpr int threads = warps * Warp::size;
// Six layers of eight images are 48 blocks, fewer than an H100 has multiprocessors. Left to itself, ptxas keeps room
// for three or four blocks on one, and spills.
constexpr int blocks_per_multiprocessor = 2;
// A warp has four rows of logits in flight, each read in whole sectors of 32 bytes, and reduces them in three steps.
constexpr int lanes_per_query = 8;
constexpr int queries_per_warp = Warp::size / lanes_per_query;

// What the warps of a block tell each other.
struct Totals {
    unsigned long long unusable;
    double lowest[warps];
    double highest[warps];
};

template <typename Logit, typename Real>
struct Problem {
    const Logit* logits;  // [Q, classes]
    const void* boxes;
    int64_t first_box;  // where query 0 has its first coordinate
    const void* extra;
    int64_t first_target;
    int32_t targets;
    int32_t queries;
    bool rows_are_targets;
    Real* highest;  // [Q] logit
    Real* scale;    // [Q]: 1 / sum of e^(logit - highest)
    Real* tile;     // [rows, columns]

    __device__ Real* cost(int64_t q, int64_t t) const {
        return tile + (rows_are_targets ? t * queries + q : q * targets + t);
    }
};

template <typename Real>
__device__ Real load(const void* from, int32_t dtype, int64_t i) {
    switch (dtype) {
        case detr_fast_float64:
            return static_cast<Real>(static_cast<const double*>(from)[i]);
        case detr_fast_bfloat16:
            return static_cast<Real>(widened(static_cast<const Bfloat16*>(from)[i]));
        case detr_fast_float16:
            return static_cast<Real>(widened(static_cast<const Float16*>(from)[i]));
        default:
            return static_cast<Real>(static_cast<const float*>(from)[i]);
    }
}

template <typename Real>
__device__ Box<Real> load_box(const void* from, int32_t dtype, int64_t i) {
    return Box<Real>::of(load<Real>(from, dtype, i), load<Real>(from, dtype, i + 1), load<Real>(from, dtype, i + 2),
                         load<Real>(from, dtype, i + 3));
}

// All lanes take part to the end: those behind the last query repeat it.
template <typename Logit, typename Real>
__device__ void softmax_statistics(const Batch& batch, const Problem<Logit, Real>& problem) {
    const auto first = static_cast<int64_t>(threadIdx.x / Warp::size) * queries_per_warp;
    const int group = static_cast<int>(threadIdx.x % Warp::size) / lanes_per_query;
    const int member = static_cast<int>(threadIdx.x % lanes_per_query);
    for (int64_t base = first; base < problem.queries; base += warps * queries_per_warp) {
        const int64_t q = base + group < problem.queries ? base + group : problem.queries - 1;
        const Logit* logits = problem.logits + q * batch.logit_strides[1];
        Real highest = -Limits<Real>::infinity;
        for (int64_t c = member; c < batch.classes; c += lanes_per_query) {
            highest = box::higher(static_cast<Real>(widened(logits[c])), highest);
        }
        for (int distance = lanes_per_query / 2; distance > 0; distance /= 2) {
            highest = box::higher(__shfl_xor_sync(Warp::everyone, highest, distance), highest);
        }
        Real sum = 0;
        for (int64_t c = member; c < batch.classes; c += lanes_per_query) {
            sum += std::exp(static_cast<Real>(widened(logits[c])) - highest);
        }
        for (int distance = lanes_per_query / 2; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(Warp::everyone, sum, distance);
        }
        if (member == 0) {
            problem.highest[q] = highest;
            problem.scale[q] = Real(1) / sum;
        }
    }
}

// Not a number where the label is out of range: nobody has looked at it before.
template <typename Logit, typename Real>
__device__ Real class_cost(const Batch& batch, const Problem<Logit, Real>& problem, int64_t q, int64_t label) {
    if (label < 0 || label >= batch.classes) return Limits<Real>::not_a_number;
    const auto logit = static_cast<Real>(widened(problem.logits[q * batch.logit_strides[1] + label]));
    if (batch.weights.focal) {
        return focal_class_cost(logit, static_cast<Real>(batch.weights.alpha), static_cast<Real>(batch.weights.gamma));
    }
    return -std::exp(logit - problem.highest[q]) * problem.scale[q];
}

// A unit of work is a target and as many queries as a warp has lanes. Counts what is unusable.
template <typename Logit, typename Real>
__device__ void fill_tile(const Batch& batch, const Problem<Logit, Real>& problem, Totals* totals) {
    const auto weights = PairWeights<Real>::of(batch.weights);
    const int64_t units_per_target = (static_cast<int64_t>(problem.queries) + Warp::size - 1) / Warp::size;
    const auto lane = static_cast<int64_t>(threadIdx.x % Warp::size);
    unsigned long long unusable = 0;
    int64_t t = 0;
    for (int64_t unit = threadIdx.x / Warp::size;; unit += warps) {
        for (; unit >= units_per_target; unit -= units_per_target) ++t;
        if (t >= problem.targets) break;
        const int64_t q = unit * Warp::size + lane;
        if (q >= problem.queries) continue;
        const int64_t n = problem.first_target + t;
        const auto target = load_box<Real>(batch.target_boxes, batch.dtypes.target_boxes, 4 * n);
        const int64_t box_at = problem.first_box + q * batch.box_strides[1];
        const auto query = load_box<Real>(problem.boxes, batch.dtypes.boxes, box_at);
        Real cost = pair_cost(weights, query, target, class_cost(batch, problem, q, batch.labels[n]));
        if (batch.has_extra) cost += load<Real>(problem.extra, batch.dtypes.extra, n * problem.queries + q);
        unusable += is_usable(cost) ? 0 : 1;
        *problem.cost(q, t) = cost;
    }
    if (unusable > 0) atomicAdd(&totals->unusable, unusable);
}

// Every thread visits the same costs twice, so that only the extremes need a barrier.
template <typename Logit, typename Real>
__device__ void replace_unusable(const Problem<Logit, Real>& problem, Totals* totals) {
    const Warp team;
    const int64_t count = static_cast<int64_t>(problem.queries) * problem.targets;
    double lowest = 0;
    double highest = 0;
    for (int64_t e = threadIdx.x; e < count; e += threads) {
        if (!is_usable(problem.tile[e])) continue;
        lowest = box::lower(static_cast<double>(problem.tile[e]), lowest);
        highest = box::higher(static_cast<double>(problem.tile[e]), highest);
    }
    lowest = team.min(lowest);
    highest = -team.min(-highest);
    if (team.lane() == 0) {
        totals->lowest[threadIdx.x / Warp::size] = lowest;
        totals->highest[threadIdx.x / Warp::size] = highest;
    }
    __syncthreads();
    for (int w = 0; w < warps; ++w) {
        lowest = box::lower(totals->lowest[w], lowest);
        highest = box::higher(totals->highest[w], highest);
    }
    const auto instead = static_cast<Real>(penalty(lowest, highest, problem.queries, problem.targets));
    for (int64_t e = threadIdx.x; e < count; e += threads) {
        if (!is_usable(problem.tile[e])) problem.tile[e] = instead;
    }
    __syncthreads();
}

// Every cost is finite, so that there is a solution.
template <typename Logit, typename Real>
__device__ void solve(Warp team, const Problem<Logit, Real>& problem, void* state, int64_t* query_of_target) {
    const int32_t rows = problem.rows_are_targets ? problem.targets : problem.queries;
    const int32_t columns = problem.rows_are_targets ? problem.queries : problem.targets;
    const Assignment a = Assignment::within(state, rows, columns);
    solve_assignment(team, CostMatrix<Real>{problem.tile, columns, rows, columns}, a);
    const int32_t* match = problem.rows_are_targets ? a.column_of_row : a.row_of_column;
    for (int64_t t = team.lane(); t < problem.targets; t += Warp::size) query_of_target[t] = match[t];
}

// A block takes an image of a layer. All warps compute its costs, then the first one solves it.
template <typename Logit>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
    matching_kernel(const Batch batch, const Layers layers, const Images images) {
    using Real = std::conditional_t<std::is_same<Logit, double>::value, double, float>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const unsigned layer = blockIdx.x / batch.images;
    const unsigned image = blockIdx.x % batch.images;
    const int64_t l = batch.first_layer + layer;
    const int64_t b = batch.first_image + image;
    const Placement& placement = batch.placement;
    auto* totals = reinterpret_cast<Totals*>(shared_memory);
    unsigned char* shared = shared_memory + sizeof(Totals);
    unsigned char* workspace = batch.workspace + blockIdx.x * placement.workspace_bytes;
    unsigned char* state = placement.state_is_shared ? shared : workspace;
    unsigned char* tile = placement.tile_is_shared ? shared : workspace;

    Problem<Logit, Real> problem{};
    problem.logits = static_cast<const Logit*>(layers.logits[layer]) + b * batch.logit_strides[0];
    problem.boxes = layers.boxes[layer];
    problem.first_box = b * batch.box_strides[0];
    problem.extra = layers.extra[layer];
    const Span span = targets_of(batch, images, image);
    problem.first_target = span.first;
    problem.targets = span.count;
    problem.queries = static_cast<int32_t>(batch.queries);
    problem.rows_are_targets = problem.targets < problem.queries;
    // The solver's state is not in use before the costs are there, and is larger than these two.
    problem.highest = reinterpret_cast<Real*>(state);
    problem.scale = problem.highest + problem.queries;
    problem.tile = reinterpret_cast<Real*>(
        tile + (placement.tile_is_shared == placement.state_is_shared ? placement.state_bytes : 0));

    if (threadIdx.x == 0) totals->unusable = 0;
    if (problem.queries > 0 && problem.targets > 0) {
        if (!batch.weights.focal) softmax_statistics(batch, problem);
        __syncthreads();
        fill_tile(batch, problem, totals);
        __syncthreads();
        if (totals->unusable > 0) replace_unusable(problem, totals);
    }
    if (threadIdx.x >= Warp::size) return;
    if (threadIdx.x == 0) batch.nonfinite[l * batch.all_images + b] = static_cast<int64_t>(totals->unusable);
    solve(Warp{}, problem, state, batch.query_of_target + l * batch.all_targets + problem.first_target);
}

int64_t most_targets(const detr_fast_matching_inputs& in) {
    int64_t most = 0;
    for (int64_t b = 0; b < in.images; ++b) most = std::max(most, in.num_targets[b]);
    return most;
}

// The sizes of the largest problem hold for all: rows and columns both grow with the number of targets.
Placement place(const detr_fast_matching_inputs& in, size_t shared_limit) {
    const int64_t most = most_targets(in);
    const size_t state = Assignment::bytes(std::min(most, in.queries), std::max(most, in.queries));
    const size_t tile = rounded(static_cast<size_t>(most * in.queries) * (in.is_double ? 8 : 4));
    Placement placement{};
    placement.shared_limit = shared_limit;
    placement.state_is_shared = sizeof(Totals) + state <= shared_limit;
    placement.tile_is_shared = sizeof(Totals) + state + tile <= shared_limit;
    placement.state_bytes = state;
    placement.shared_bytes =
        sizeof(Totals) + (placement.state_is_shared ? state : 0) + (placement.tile_is_shared ? tile : 0);
    placement.workspace_bytes = (placement.state_is_shared ? 0 : state) + (placement.tile_is_shared ? 0 : tile);
    return placement;
}

// Takes images from `first` on for a launch, and returns how many.
int64_t take_images(const detr_fast_matching_inputs& in, int64_t first, Images* images) {
    int64_t count = 0;
    int64_t targets = 0;
    while (count < images_per_launch && first + count < in.images) {
        targets += in.num_targets[first + count];
        if (targets > std::numeric_limits<int32_t>::max()) break;
        images->first_target[++count] = static_cast<int32_t>(targets);
    }
    return count;
}

Layers take_layers(const detr_fast_matching_inputs& in, int64_t first, int64_t count) {
    Layers layers{};
    std::copy_n(in.logits + first, count, layers.logits);
    std::copy_n(in.boxes + first, count, layers.boxes);
    if (in.extra != nullptr) std::copy_n(in.extra + first, count, layers.extra);
    return layers;
}

template <typename Logit>
cudaError_t launch(const detr_fast_matching_inputs& in, Batch batch, cudaStream_t stream) {
    cudaError_t error = allow_shared_memory(matching_kernel<Logit>, batch.placement.shared_limit);
    while (batch.first_image < in.images && error == cudaSuccess) {
        Images images{};
        const int64_t image_count = take_images(in, batch.first_image, &images);
        if (image_count == 0) return cudaErrorInvalidValue;  // more targets than the solver can number
        batch.images = static_cast<unsigned>(image_count);
        for (int64_t first = 0; first < in.layers && error == cudaSuccess; first += layers_per_launch) {
            const int64_t layer_count = std::min<int64_t>(layers_per_launch, in.layers - first);
            batch.first_layer = first;
            cudaLaunchConfig_t config{};
            config.gridDim = dim3(static_cast<unsigned>(layer_count * image_count));
            config.blockDim = dim3(threads);
            config.dynamicSmemBytes = batch.placement.shared_bytes;
            config.stream = stream;
            error = cudaLaunchKernelEx(&config, matching_kernel<Logit>, static_cast<const Batch>(batch),
                                       static_cast<const Layers>(take_layers(in, first, layer_count)),
                                       static_cast<const Images>(images));
        }
        batch.first_target += images.first_target[image_count];
        batch.first_image += image_count;
    }
    return error;
}

cudaError_t launch_for_dtype(const detr_fast_matching_inputs& in, const Batch& batch, cudaStream_t stream) {
    switch (batch.dtypes.logits) {
        case detr_fast_float32:
            return launch<float>(in, batch, stream);
        case detr_fast_float64:
            return launch<double>(in, batch, stream);
        case detr_fast_bfloat16:
            return launch<Bfloat16>(in, batch, stream);
        case detr_fast_float16:
            return launch<Float16>(in, batch, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

bool are_valid(const detr_fast_matching_inputs& in, const detr_fast_matching_dtypes& dtypes) {
    return in.is_double == (dtypes.logits == detr_fast_float64) && in.queries <= std::numeric_limits<int32_t>::max();
}

}  // namespace
}  // namespace detr_fast

int64_t detr_fast_matching_cuda_workspace(const detr_fast_matching_inputs* inputs, int device) {
    size_t shared_limit = 0;
    const cudaError_t error = detr_fast::shared_memory_limit(device, &shared_limit);
    if (error != cudaSuccess) return -static_cast<int64_t>(error);
    // Launches follow one another, so that the blocks of one are all that need room.
    const int64_t layers = std::min<int64_t>(inputs->layers, detr_fast::layers_per_launch);
    const int64_t images = std::min<int64_t>(inputs->images, detr_fast::images_per_launch);
    return layers * images * static_cast<int64_t>(detr_fast::place(*inputs, shared_limit).workspace_bytes);
}

int detr_fast_matching_cuda(const detr_fast_matching_inputs* inputs, const detr_fast_matching_dtypes* dtypes,
                            const detr_fast_cost_weights* weights, const detr_fast_padded_targets* padded,
                            int64_t* query_of_target, int64_t* nonfinite, void* workspace, int device, void* stream) {
    using namespace detr_fast;
    if (!are_valid(*inputs, *dtypes)) return cudaErrorInvalidValue;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    Batch batch{};
    size_t shared_limit = 0;
    const cudaError_t error = shared_memory_limit(device, &shared_limit);
    if (error != cudaSuccess) return error;
    batch.queries = inputs->queries;
    batch.classes = inputs->classes;
    std::copy_n(inputs->logit_strides, 2, batch.logit_strides);
    std::copy_n(inputs->box_strides, 2, batch.box_strides);
    batch.labels = inputs->labels;
    batch.target_boxes = inputs->target_boxes;
    batch.has_extra = inputs->extra != nullptr;
    batch.dtypes = *dtypes;
    batch.weights = *weights;
    batch.all_images = inputs->images;
    for (int64_t b = 0; b < inputs->images; ++b) batch.all_targets += inputs->num_targets[b];
    if (padded->offsets != nullptr) batch.all_targets = padded->room;
    batch.offsets = padded->offsets;
    batch.most_targets = most_targets(*inputs);
    batch.query_of_target = query_of_target;
    batch.nonfinite = nonfinite;
    batch.workspace = static_cast<unsigned char*>(workspace);
    batch.placement = place(*inputs, shared_limit);
    return launch_for_dtype(*inputs, batch, static_cast<cudaStream_t>(stream));
}
