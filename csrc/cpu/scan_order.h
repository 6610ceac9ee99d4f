// The order in which SciPy scans open columns, which decides ties: at first from the last column to the first; a column
// that is closed leaves a gap, which the order's last column fills.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "lanes.h"

namespace detr_fast {

struct ScanOrder {
    int32_t columns;
    int64_t slots;
    bool is_built;
    int32_t* column_at;           // [columns]: of each position
    int32_t* position_of_column;  // [columns]: its inverse
    int32_t* slot_of_column;      // [columns]: -1 where there is none
    int64_t* position_of_slot;    // [slots]: of the slot's column

    void take(Layout& layout, int64_t num_columns, int64_t num_slots) {
        columns = static_cast<int32_t>(num_columns);
        slots = num_slots;
        layout.take(column_at, num_columns);
        layout.take(position_of_column, num_columns);
        layout.take(slot_of_column, num_columns);
        layout.take(position_of_slot, num_slots);
    }

    DETR_FAST_INLINE void build() {
        for (int32_t j = 0; j < columns; ++j) column_at[j] = position_of_column[j] = columns - 1 - j;
        std::fill_n(slot_of_column, columns, -1);
        std::fill_n(position_of_slot, slots, std::numeric_limits<int64_t>::max());
        is_built = true;
    }

    DETR_FAST_INLINE void add_slot(int32_t slot, int32_t column) {
        slot_of_column[column] = slot;
        position_of_slot[slot] = position_of_column[column];
    }

    DETR_FAST_INLINE void move(int32_t column, int32_t position) {
        position_of_column[column] = position;
        if (slot_of_column[column] >= 0) position_of_slot[slot_of_column[column]] = position;
    }

    // `closed`: how many columns are closed already.
    DETR_FAST_INLINE void close(int32_t column, int32_t closed) {
        const int32_t last = column_at[columns - 1 - closed];
        column_at[position_of_column[column]] = last;
        move(last, position_of_column[column]);
    }

    // A closed column keeps its position while others fill the gap, so closing can be undone in reverse.
    DETR_FAST_INLINE void reopen(int32_t column, int32_t closed) {
        const int32_t position = position_of_column[column];
        const int32_t moved = column_at[position];
        move(moved, columns - 1 - closed);
        column_at[columns - 1 - closed] = moved;
        column_at[position] = column;
        move(column, position);
    }
};

}  // namespace detr_fast
