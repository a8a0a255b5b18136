/* Memory of large tensors: huge pages that are kept when freed, and that never fall to pieces.
 *
 * A tensor of LARGE bytes or more gets whole units of 2 MiB, next to each other in a range of addresses reserved once. What is freed is kept for the next
 * tensor of the same size. Where there is none, units are taken from kept blocks of other sizes and moved to the new addresses: the kernel moves its page
 * tables, no byte is copied or cleared. So no more memory is held than was once needed at the same time, whatever sizes came in which order.
 * Smaller tensors, and all where the range is used up, come from the allocator that was there before.
 */
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

namespace {

constexpr size_t UNIT = size_t(2) << 20, LARGE = size_t(4) << 20;

class HugePages final : public c10::Allocator {
  public:
    /* Return whether `bytes` of addresses could be reserved; nothing else is touched. */
    bool reserve(size_t bytes, c10::Allocator *smaller)
    {
        void *got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) return false;
        madvise(got, bytes, MADV_HUGEPAGE), madvise(got, bytes, MADV_DONTDUMP);
        next_ = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(got) + UNIT - 1) / UNIT * UNIT);
        begin_ = next_, end_ = static_cast<char *>(got) + bytes, smaller_ = smaller;
        return true;
    }

    c10::DataPtr allocate(size_t bytes) override
    {
        char *at = bytes < LARGE ? nullptr : take((bytes + UNIT - 1) / UNIT);
        return at ? c10::DataPtr(at, at, give_back, c10::Device(c10::DeviceType::CPU)) : smaller_->allocate(bytes);
    }

    c10::DeleterFnPtr raw_deleter() const override { return give_back; }
    void copy_data(void *to, const void *from, std::size_t count) const override { std::memcpy(to, from, count); }

    /* Give what is kept back to the kernel; its addresses stay ours. */
    void release()
    {
        std::lock_guard<std::mutex> guard(lock_);
        for (auto &[units, at] : kept_) madvise(at, units * UNIT, MADV_DONTNEED), empty_.emplace(units, at);
        kept_.clear();
    }

  private:
    using Blocks = std::multimap<size_t, char *>; /* by their number of units */

    char *take(size_t units)
    {
        std::lock_guard<std::mutex> guard(lock_);
        char *at = exactly(kept_, units);
        if (!at) at = exactly(empty_, units);
        else return used_[at] = units, at;
        if (!at && size_t(end_ - next_) / UNIT >= units) at = next_, next_ += units * UNIT;
        if (!at) return nullptr;
        for (size_t filled = 0; filled < units && !kept_.empty();) filled += move_units(at + filled * UNIT, units - filled);
        used_[at] = units; /* what is not filled yet, the kernel fills at the first touch */
        return at;
    }

    static char *exactly(Blocks &blocks, size_t units)
    {
        auto found = blocks.find(units);
        if (found == blocks.end()) return nullptr;
        char *at = found->second;
        blocks.erase(found);
        return at;
    }

    /* Move up to `wanted` units of one kept block to `to`: the smallest that is enough, else the largest. Return how many. */
    size_t move_units(char *to, size_t wanted)
    {
        auto from = kept_.lower_bound(wanted);
        if (from == kept_.end()) --from;
        auto [units, at] = *from;
        kept_.erase(from);
        size_t moved = std::min(units, wanted), left = units - moved;
        char *end = at + left * UNIT;
        if (mremap(end, moved * UNIT, moved * UNIT, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == MAP_FAILED)
            madvise(end, moved * UNIT, MADV_DONTNEED); /* an old kernel, or too many ranges: fresh pages then */
        empty_.emplace(moved, end);
        if (left) kept_.emplace(left, at);
        return moved;
    }

    static void give_back(void *at);

    std::mutex lock_;
    Blocks kept_, empty_; /* with pages and without */
    std::unordered_map<char *, size_t> used_;
    char *begin_ = nullptr, *next_ = nullptr, *end_ = nullptr;
    c10::Allocator *smaller_ = nullptr;
};

HugePages *pages; /* never deleted: tensors outlive everything */

void HugePages::give_back(void *at)
{
    char *block = static_cast<char *>(at);
    if (block < pages->begin_ || block >= pages->end_) return pages->smaller_->raw_deleter()(at);
    std::lock_guard<std::mutex> guard(pages->lock_);
    auto found = pages->used_.find(block);
    pages->kept_.emplace(found->second, block);
    pages->used_.erase(found);
}

} // namespace

extern "C" {
/* Return 1 where torch's tensors come from here from now on. */
int install(size_t bytes)
{
    if (pages) return 1;
    auto *made = new HugePages;
    if (!made->reserve(bytes, c10::GetCPUAllocator())) return delete made, 0;
    pages = made;
    c10::SetCPUAllocator(pages, 255);
    return 1;
}

void release(void)
{
    if (pages) pages->release();
}
}
