#include "int8_tile.h"

#include <algorithm>
#include <cstring>

#include "widths.h"

#if defined(DETR_FAST_MANY_TARGETS)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace detr_fast {
namespace {

void multiply_plain(const Int8Product& p) {
    for (int64_t r = 0; r < p.rows; ++r) {
        const uint8_t* row = p.left + r * p.left_step;
        int32_t* const sums = p.sums + r * int8_panel_columns;
        std::fill_n(sums, int8_panel_columns, 0);
        const int8_t* panel = p.panel;
        for (int64_t k = 0; k < p.depth; k += 4, panel += 4 * int8_panel_columns) {
            for (int64_t c = 0; c < int8_panel_columns; ++c) {
                const int8_t* four = panel + 4 * c;
                sums[c] += row[k] * four[0] + row[k + 1] * four[1] + row[k + 2] * four[2] + row[k + 3] * four[3];
            }
        }
    }
}

#if defined(DETR_FAST_MANY_TARGETS)

int32_t four_bytes(const uint8_t* from) {
    int32_t x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

// AVX2 sums products of bytes in 16 bits, which overflow. So bytes become words, the even ones and the odd ones apart:
// the sum of two products of words has 32 bits, and each of its lanes belongs to one column.
template <int rows>
__attribute__((target("avx2"))) void multiply_pairs(const Int8Product& p, int64_t first, int64_t column) {
    constexpr int vectors = 2;
    __m256i sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) sum[r][v] = _mm256_setzero_si256();
    }
    const uint8_t* const left = p.left + first * p.left_step;
    const int8_t* panel = p.panel + 4 * column;
    const __m256i low = _mm256_set1_epi16(0xff);
    for (int64_t k = 0; k < p.depth; k += 4, panel += 4 * int8_panel_columns) {
        __m256i even[vectors], odd[vectors];
        for (int v = 0; v < vectors; ++v) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * v));
            even[v] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
            odd[v] = _mm256_srai_epi16(bytes, 8);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m256i bytes = _mm256_set1_epi32(four_bytes(left + r * p.left_step + k));
            const __m256i left_even = _mm256_and_si256(bytes, low), left_odd = _mm256_srli_epi16(bytes, 8);
            for (int v = 0; v < vectors; ++v) {
                const __m256i of_even = _mm256_madd_epi16(left_even, even[v]);
                const __m256i of_odd = _mm256_madd_epi16(left_odd, odd[v]);
                sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_add_epi32(of_even, of_odd));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) {
            int32_t* const to = p.sums + (first + r) * int8_panel_columns + column + 8 * v;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum[r][v]);
        }
    }
}

void multiply_by_pairs(const Int8Product& p) {
    for (int64_t column = 0; column < int8_panel_columns; column += 16) {
        int64_t r = 0;
        for (; r + 4 <= p.rows; r += 4) multiply_pairs<4>(p, r, column);
        for (; r < p.rows; ++r) multiply_pairs<1>(p, r, column);
    }
}

// Of 32 registers 16 are sums, ten times as many as it takes to hide an instruction's latency on two ports.
template <int rows>
__attribute__((target("arch=x86-64-v4,avx512vnni"))) void multiply_vnni(const Int8Product& p, int64_t first,
                                                                        int64_t column) {
    constexpr int vectors = 2;
    __m512i sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_si512();
    }
    const uint8_t* const left = p.left + first * p.left_step;
    const int8_t* panel = p.panel + 4 * column;
    for (int64_t k = 0; k < p.depth; k += 4, panel += 4 * int8_panel_columns) {
        const __m512i right[vectors] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m512i four = _mm512_set1_epi32(four_bytes(left + r * p.left_step + k));
            for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], four, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        int32_t* const to = p.sums + (first + r) * int8_panel_columns + column;
        for (int v = 0; v < vectors; ++v) _mm512_storeu_si512(to + 16 * v, sum[r][v]);
    }
}

void multiply_by_vnni(const Int8Product& p) {
    for (int64_t column = 0; column < int8_panel_columns; column += 32) {
        int64_t r = 0;
        for (; r + 8 <= p.rows; r += 8) multiply_vnni<8>(p, r, column);
        for (; r < p.rows; ++r) multiply_vnni<1>(p, r, column);
    }
}

// 32 rows by 32 columns at a time: four tiles of sums, two of either factor.
__attribute__((target("amx-tile,amx-int8"))) void multiply_by_amx(const Int8Product& p) {
    constexpr int64_t right_step = 4 * int8_panel_columns, sums_step = 4 * int8_panel_columns;
    const uint8_t* const lower = p.left + 16 * p.left_step;
    for (int64_t column = 0; column < int8_panel_columns; column += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const int8_t* panel = p.panel + 4 * column;
        for (int64_t k = 0; k < p.depth; k += 64, panel += 16 * right_step) {
            _tile_loadd(4, p.left + k, p.left_step);
            _tile_loadd(6, panel, right_step);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, panel + 64, right_step);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, lower + k, p.left_step);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        int32_t* const sums = p.sums + column;
        _tile_stored(0, sums, sums_step);
        _tile_stored(1, sums + 16, sums_step);
        _tile_stored(2, sums + 16 * int8_panel_columns, sums_step);
        _tile_stored(3, sums + 16 * int8_panel_columns + 16, sums_step);
    }
}

// Eight tiles of 16 rows of 64 bytes. A constant, because GCC 12 takes the instruction to read but its first 8 bytes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
constexpr TileShapes tile_shapes;

// What the thread had is kept: others compute in tiles on it, too.
__attribute__((target("amx-tile"))) void configure_tiles(uint8_t* before) {
    _tile_storeconfig(before);
    _tile_loadconfig(&tile_shapes);
}

__attribute__((target("amx-tile"))) void restore_tiles(const uint8_t* before) {
    _tile_loadconfig(before);
}

#endif

#if defined(DETR_FAST_MANY_TARGETS) && defined(__linux__)
// The system gives the registers to those alone who ask.
bool may_use_tiles() {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#else
bool may_use_tiles() {
    return false;
}
#endif

Int8Instructions fastest_at(int bytes) {
#if defined(DETR_FAST_MANY_TARGETS)
    static const bool has_tiles = may_use_tiles();
    if (bytes == 64 && has_tiles) return int8_amx;
    if (bytes == 64 && __builtin_cpu_supports("avx512vnni")) return int8_vnni;
    if (bytes >= 32) return int8_pairs;
#endif
    (void)bytes;
    return int8_plain;
}

}  // namespace

Int8Instructions fastest_int8_instructions() {
    return fastest_at(vector_bytes());
}

Int8Products::Int8Products(Int8Instructions instructions) : multiply_(multiply_plain), has_tiles_(false) {
#if defined(DETR_FAST_MANY_TARGETS)
    if (instructions == int8_pairs) multiply_ = multiply_by_pairs;
    if (instructions == int8_vnni) multiply_ = multiply_by_vnni;
    if (instructions != int8_amx) return;
    multiply_ = multiply_by_amx;
    has_tiles_ = true;
    configure_tiles(tiles_before_);
#else
    (void)instructions;
#endif
}

Int8Products::~Int8Products() {
#if defined(DETR_FAST_MANY_TARGETS)
    if (has_tiles_) restore_tiles(tiles_before_);
#endif
}

}  // namespace detr_fast
