// Memory that results lie in. A large piece that nobody holds any more is kept for the next result: the system gives
// fresh memory page by page, when it is first written, which takes longer than to compute what is written.

#pragma once

#include <cstddef>

namespace detr_fast {

struct Piece {
    void* memory;  // at a multiple of 64
    size_t bytes;
};

// A piece of at least so many bytes, not filled. Throws std::bad_alloc. Any thread may take one and give it back.
Piece take_memory(size_t bytes);
void give_back_memory(Piece piece);

}  // namespace detr_fast
