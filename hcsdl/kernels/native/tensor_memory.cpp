/* Memory of large tensors: huge pages that are kept when freed, and that never fall to pieces.
 *
 * A tensor of two units or more gets whole units, next to each other in a range of addresses reserved once. What is freed is kept for the next tensor of the
 * same size. Where there is none, units are taken from kept blocks of other sizes and moved to the new addresses: the kernel moves its page tables, no byte
 * is copied or cleared. So no more memory is held than was once needed at the same time, whatever sizes came in which order.
 * Smaller tensors, and all where the range is used up, come from the allocator that was there before.
 *
 * The kernel notes each range of addresses whose pages came from elsewhere. It allows a process 65,530 such ranges (vm.max_map_count), so addresses without
 * pages are mapped anew, which joins them to their neighbours, and used again, and a unit, 2 MiB, is larger where the machine's memory has more than MOST.
 * Before Linux 6.17 it moves one range at a time, so a block knows its pieces.
 */
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t MOST = 32768; /* units in the machine's memory */

size_t unit_bytes()
{
    size_t bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)), most = MOST * HUGE_PAGE;
    return (bytes + most - 1) / most * HUGE_PAGE;
}

const size_t UNIT = unit_bytes();

class HugePages final : public c10::Allocator {
  public:
    /* Return whether `bytes` of addresses could be reserved; nothing else is touched. */
    bool reserve(size_t bytes, c10::Allocator *smaller)
    {
        char *got = map_anew(nullptr, bytes);
        if (!got) return false;
        next_ = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(got) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        begin_ = next_, end_ = got + bytes, smaller_ = smaller;
        return true;
    }

    c10::DataPtr allocate(size_t bytes) override
    {
        char *at = bytes < 2 * UNIT ? nullptr : take((bytes + UNIT - 1) / UNIT);
        return at ? c10::DataPtr(at, at, give_back, c10::Device(c10::DeviceType::CPU)) : smaller_->allocate(bytes);
    }

    c10::DeleterFnPtr raw_deleter() const override { return give_back; }
    void copy_data(void *to, const void *from, std::size_t count) const override { std::memcpy(to, from, count); }

    /* Give what is kept back to the kernel; its addresses stay ours. */
    void release()
    {
        std::lock_guard<std::mutex> guard(lock_);
        for (auto &[units, block] : kept_) vacate(block.at, units);
        kept_.clear();
    }

  private:
    struct Block {
        char *at;
        size_t units;
        std::vector<size_t> pieces; /* units of each range that the kernel can move at once */
    };

    /* Map addresses without pages, at `at` if given, where what was there goes. Return where, null where that fails. */
    static char *map_anew(char *at, size_t bytes)
    {
        int fixed = at ? MAP_FIXED : 0;
        void *got = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
        if (got == MAP_FAILED) return nullptr;
        madvise(got, bytes, MADV_HUGEPAGE), madvise(got, bytes, MADV_DONTDUMP);
        return static_cast<char *>(got);
    }

    char *take(size_t units)
    {
        std::lock_guard<std::mutex> guard(lock_);
        auto found = kept_.find(units);
        if (found != kept_.end()) {
            char *at = found->second.at;
            used_[at] = std::move(found->second);
            kept_.erase(found);
            return at;
        }
        Block block = {room(units), 0, {}};
        if (!block.at) return nullptr;
        while (block.units < units && !kept_.empty()) move_units(block, units - block.units);
        if (size_t fresh = units - block.units) { /* the kernel fills these at the first touch */
            map_anew(block.at + block.units * UNIT, fresh * UNIT);
            block.units = units, block.pieces.push_back(fresh);
        }
        char *at = block.at;
        used_[at] = std::move(block);
        return at;
    }

    /* Addresses without pages: the first that are enough, else new ones, else null. */
    char *room(size_t units)
    {
        for (auto found = empty_.begin(); found != empty_.end(); ++found) {
            auto [at, there] = *found;
            if (there < units) continue;
            empty_.erase(found);
            if (there > units) empty_.emplace(at + units * UNIT, there - units);
            return at;
        }
        if (size_t(end_ - next_) / UNIT < units) return nullptr;
        next_ += units * UNIT;
        return next_ - units * UNIT;
    }

    /* Move up to `wanted` units of one kept block to the end of `to`: of the smallest that is enough, else of the largest. */
    void move_units(Block &to, size_t wanted)
    {
        auto chosen = kept_.lower_bound(wanted);
        if (chosen == kept_.end()) --chosen;
        Block from = std::move(chosen->second);
        kept_.erase(chosen);
        size_t moved = std::min(from.units, wanted);
        for (size_t left = moved; left;) {
            size_t &piece = from.pieces.back(), now = std::min(piece, left);
            from.units -= now, piece -= now, left -= now;
            if (!piece) from.pieces.pop_back();
            move(from.at + from.units * UNIT, to.at + to.units * UNIT, now * UNIT);
            to.units += now, to.pieces.push_back(now);
        }
        vacate(from.at + from.units * UNIT, moved);
        if (from.units) kept_.emplace(from.units, std::move(from));
    }

    static void move(char *from, char *to, size_t bytes)
    {
        if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == MAP_FAILED) map_anew(to, bytes); /* fresh pages, then */
    }

    /* Give the pages of these addresses back, if they have any, and the addresses to those that are free. */
    void vacate(char *at, size_t units)
    {
        if (!map_anew(at, units * UNIT)) madvise(at, units * UNIT, MADV_DONTNEED);
        auto here = empty_.emplace(at, units).first, after = std::next(here);
        if (after != empty_.end() && at + units * UNIT == after->first) here->second += after->second, empty_.erase(after);
        if (here == empty_.begin()) return;
        auto before = std::prev(here);
        if (before->first + before->second * UNIT == at) before->second += here->second, empty_.erase(here);
    }

    static void give_back(void *at);

    std::mutex lock_;
    std::multimap<size_t, Block> kept_; /* by their number of units */
    std::map<char *, size_t> empty_;    /* addresses below next_ without pages, and how many units */
    std::unordered_map<char *, Block> used_;
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
    size_t units = found->second.units;
    pages->kept_.emplace(units, std::move(found->second));
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
