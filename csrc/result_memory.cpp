#include "result_memory.h"

#include <array>
#include <mutex>
#include <new>
#include <utility>

#include "cpu/memory_use.h"

namespace detr_fast {

namespace {

constexpr std::align_val_t alignment{64};

// Smaller pieces are malloc's, which keeps them itself.
constexpr size_t smallest_kept = size_t{64} << 10;
// The gradients of 32 images with 300 queries take 22 MiB.
constexpr size_t largest_kept = size_t{32} << 20;

void release(Piece piece) {
    ::operator delete(piece.memory, alignment);
}

// The pieces that were given back last. Never waits for its lock: another thread would be as fast by asking the system,
// and in a forked child nobody may be left to unlock it.
class KeptPieces {
  public:
    // Never destroyed: tensors may outlive every static object.
    static KeptPieces& instance() {
        static auto* kept = new KeptPieces;
        return *kept;
    }

    // One of at least so many bytes and at most twice as many, or none.
    Piece take(size_t bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock()) return {};
        for (Piece& piece : pieces_) {
            if (piece.bytes >= bytes && piece.bytes / 2 <= bytes) return std::exchange(piece, Piece{});
        }
        return {};
    }

    // Returns the piece that has to go for it: an empty one, the one kept longest, or itself.
    Piece keep(Piece piece) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock()) return piece;
        for (Piece& place : pieces_) {
            if (place.memory == nullptr) return std::exchange(place, piece);
        }
        next_ = (next_ + 1) % pieces_.size();
        return std::exchange(pieces_[next_], piece);
    }

  private:
    std::mutex mutex_;
    std::array<Piece, 4> pieces_{};  // gradients of logits and of two box losses, and one more
    size_t next_ = 0;
};

Piece take_piece(size_t bytes) {
    if (bytes >= smallest_kept) {
        const Piece kept = KeptPieces::instance().take(bytes);
        if (kept.memory != nullptr) return kept;
    }
    return {::operator new(bytes, alignment), bytes};
}

}  // namespace

Piece take_memory(size_t bytes) {
    const Piece piece = take_piece(bytes);
    MemoryUse::add(static_cast<int64_t>(piece.bytes));
    return piece;
}

void give_back_memory(Piece piece) {
    MemoryUse::add(-static_cast<int64_t>(piece.bytes));
    const bool worth_keeping = piece.bytes >= smallest_kept && piece.bytes <= largest_kept;
    release(worth_keeping ? KeptPieces::instance().keep(piece) : piece);
}

}  // namespace detr_fast
