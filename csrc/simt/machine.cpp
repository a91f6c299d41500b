#include "simt/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <set>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// Saves the callee-saved registers on the running stack, stores the stack pointer, and continues on the other stack.
// (swapcontext would also work, but it makes a system call each time.)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

static void* make_fiber(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes) - 2;
    *top = reinterpret_cast<void*>(entry);  // the first switch returns to this address
    std::memset(top - 6, 0, 6 * sizeof(void*));
    return top - 6;
}
#else
#include <ucontext.h>

static void simt_switch(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}
static void* make_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto* context = new (stack) ucontext_t;  // at the far end of its own stack
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
    context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

namespace simt {

Thread* current = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer tracks the stack in use, so it must be told of every change.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

std::string name(const Thread& t) {
    return "thread " + std::to_string(t.index) + " (warp " + std::to_string(t.index / 32) + ", lane " +
           std::to_string(t.lane) + ")";
}

}  // namespace

Block::Block(int threads, uint32_t shared_bytes, const Options& options, Counters& counters)
    : threads(threads), counters(counters), options_(options), shared_(shared_bytes), words_((shared_bytes + 3) / 4),
      thread_(threads), warp_(threads / 32), stack_bytes_(kStackBytes), random_(options.shuffle_seed) {
    if (threads <= 0 || threads % 32 != 0 || threads > 1024)
        throw Error("a block has a multiple of 32 threads, up to 1024; got " + std::to_string(threads));
    void* memory = mmap(nullptr, stack_bytes_ * threads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(memory);
}

Block::~Block() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stacks_, stack_bytes_ * threads);
#endif
    munmap(stacks_, stack_bytes_ * threads);
}

void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    Block& block = current_block();
    try {
        (*block.kernel_)();
    } catch (...) {
        if (!block.failure_) block.failure_ = std::current_exception();
    }
    block.pause(Thread::kDone);
}

void Block::resume(Thread& thread) {
    current = &thread;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stacks_ + stack_bytes_ * thread.index, stack_bytes_);
#endif
    simt_switch(&scheduler_stack_pointer_, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
    if (failure_) std::rethrow_exception(failure_);
}

void Block::pause(Thread::State why) {
    Thread& self = *current;
    self.state = why;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(why == Thread::kDone ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    simt_switch(&self.stack_pointer, scheduler_stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// Lets every ready lane of a warp run to its next collective, in order, until no lane can continue.
bool Block::run_warp(int warp) {
    bool ran = false, again = true;
    while (again) {
        again = false;
        int order[32];
        for (int lane = 0; lane < 32; ++lane) order[lane] = lane;
        if (options_.shuffle_seed) std::shuffle(order, order + 32, random_);
        for (int lane : order) {
            Thread& thread = thread_[warp * 32 + lane];
            if (thread.state != Thread::kReady) continue;
            resume(thread);
            ran = again = true;
        }
        // A shuffled warp can be delayed at any collective, but rarely. Long runs then let warps drift far apart.
        if (options_.shuffle_seed && random_() % 64 == 0) break;
    }
    return ran;
}

void Block::run(int index, const std::function<void()>& kernel) {
    block_index = index;
    kernel_ = &kernel;
    failure_ = nullptr;
    at_barrier_ = 0;
    epoch_ = 0;
    banks_.clear();
    std::fill(shared_.begin(), shared_.end(), 0xff);  // a NaN in every format
    std::fill(words_.begin(), words_.end(), Word());
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stacks_, stack_bytes_ * threads);
#endif
    for (int w = 0; w < threads / 32; ++w) warp_[w] = Warp{w * 32};
    for (int i = 0; i < threads; ++i) {
        thread_[i] = Thread{this, &warp_[i / 32], i, i % 32};
        thread_[i].stack_pointer = make_fiber(stacks_ + stack_bytes_ * i, stack_bytes_, &Block::enter);
    }

    std::vector<int> order(threads / 32);
    for (size_t w = 0; w < order.size(); ++w) order[w] = int(w);
    while (true) {
        bool ran = false;
        if (options_.shuffle_seed) std::shuffle(order.begin(), order.end(), random_);
        for (int w : order) {
            ran |= run_warp(w);
            if (options_.shuffle_seed && random_() % 4 == 0) break;
        }
        if (ran) continue;

        // Nothing moved. A shuffled round may have left out the only warp that can move, so check the states.
        int done = 0, ready = 0;
        for (const Thread& t : thread_) done += t.state == Thread::kDone, ready += t.state == Thread::kReady;
        if (done == threads) break;
        if (ready > 0) continue;
        if (at_barrier_ == threads) {
            at_barrier_ = 0;
            ++epoch_;
            ++counters.barriers;
            for (Thread& t : thread_) t.state = Thread::kReady;
            continue;
        }
        for (const Thread& t : thread_)
            if (t.state == Thread::kAtWarp)
                throw Error(name(t) + " waits at " + t.warp->collective + " for lanes that never come");
        throw Error("block barrier reached by " + std::to_string(at_barrier_) + " of " + std::to_string(threads) +
                    " threads");
    }
    for (const Thread& t : thread_)
        if (!t.copies.empty()) throw Error(name(t) + " ended without waiting for its cp.async");
    for (const auto& [key, record] : banks_) count_wavefronts(record.address, record.lanes, record.bytes);
}

void Block::sync_block() {
    ++at_barrier_;
    pause(Thread::kAtBlock);
}

void Block::sync_warp() {
    Thread* self = current;
    collective("sync_warp", *self, [](Thread* const(&lanes)[32]) {
        for (Thread* t : lanes) ++t->warp_epoch;
    });
}

void Block::check_bounds(uint32_t address, uint32_t bytes, const char* what) {
    if (uint64_t(address) + bytes > shared_.size())
        throw Error(std::string("out of bounds: ") + name(*current) + ", " + what + " of " + std::to_string(bytes) +
                    " bytes at shared address " + std::to_string(address) + " of " + std::to_string(shared_.size()));
    if (address % bytes != 0)
        throw Error(std::string("misaligned: ") + name(*current) + ", " + what + " of " + std::to_string(bytes) +
                    " bytes at shared address " + std::to_string(address));
}

// Whether an access by `thread` in these epochs is ordered before the present access of the current thread.
bool Block::ordered(int thread, uint32_t epoch, uint32_t warp_epoch) const {
    if (thread < 0 || thread == current->index || epoch < epoch_) return true;
    return thread / 32 == current->index / 32 && warp_epoch < current->warp_epoch;
}

void Block::race(const char* what, uint32_t address, int other) const {
    throw Error("race: " + name(*current) + " " + what + " thread " + std::to_string(other) + " at shared address " +
                std::to_string(address) + " with no barrier between");
}

void Block::note_read(uint32_t address, uint32_t bytes) {
    if (!options_.check_races) return;
    for (uint32_t a = address; a < address + bytes; a += 4) {
        Word& word = words_[a / 4];
        if (word.writer < 0)
            throw Error("uninitialized: " + name(*current) + " reads shared address " + std::to_string(a));
        if (!ordered(word.writer, word.write_epoch, word.write_warp_epoch)) race("reads what was written by", a, word.writer);
        const bool same_epoch = word.reader >= 0 && word.read_epoch == epoch_;
        const bool same_warp = same_epoch && word.reader / 32 == current->index / 32;
        word.many_warps = same_epoch && (word.many_warps || !same_warp);
        word.many_lanes = same_warp && word.read_warp_epoch == current->warp_epoch &&
                          (word.many_lanes || word.reader != current->index);
        word.reader = current->index;
        word.read_epoch = epoch_;
        word.read_warp_epoch = current->warp_epoch;
    }
}

void Block::note_write(uint32_t address, uint32_t bytes) {
    if (!options_.check_races) return;
    for (uint32_t a = address; a < address + bytes; a += 4) {
        Word& word = words_[a / 4];
        if (!ordered(word.writer, word.write_epoch, word.write_warp_epoch)) race("overwrites what was written by", a, word.writer);
        const bool read_now = word.reader >= 0 && word.read_epoch == epoch_;
        const bool read_by_others = word.many_warps || (word.many_lanes && word.read_warp_epoch == current->warp_epoch);
        if ((read_now && read_by_others) || !ordered(word.reader, word.read_epoch, word.read_warp_epoch))
            race("overwrites what was read by", a, word.reader);
        word.writer = current->index;
        word.write_epoch = epoch_;
        word.write_warp_epoch = current->warp_epoch;
    }
}

// One access instruction moves 128 bytes per pass: 32 lanes of 4 bytes, 16 of 8, or 8 of 16. Within a pass every bank
// delivers one 4-byte word. Lanes that access the same word share it.
void Block::count_wavefronts(const uint32_t* address, uint32_t lanes, uint32_t bytes) {
    const int group = int(128 / bytes);
    for (int first = 0; first < 32; first += group) {
        std::set<uint32_t> wanted[32];
        for (int lane = first; lane < first + group; ++lane)
            if (lanes >> lane & 1)
                for (uint32_t a = address[lane]; a < address[lane] + bytes; a += 4) wanted[a / 4 % 32].insert(a / 4);
        size_t most = 0;
        for (const auto& words : wanted) most = std::max(most, words.size());
        counters.shared_wavefronts += int64_t(most);
        counters.bank_conflicts += most > 1 ? int64_t(most - 1) : 0;
    }
}

// Ordinary accesses arrive lane by lane. The n-th accesses of a warp's lanes at one source line are one instruction.
void Block::note_banks(uint32_t address, uint32_t bytes, int site) {
    if (!options_.count_banks) return;
    Thread& self = *current;
    BankRecord& record = banks_[{self.index / 32, site, self.site_visits[site]++}];
    record.address[self.lane] = address;
    record.lanes |= 1u << self.lane;
    record.bytes = bytes;
}

void Block::read_shared(uint32_t address, void* out, uint32_t bytes, int site) {
    check_bounds(address, bytes, "read");
    note_read(address, bytes);
    note_banks(address, bytes, site);
    std::memcpy(out, &shared_[address], bytes);
}

void Block::write_shared(uint32_t address, const void* in, uint32_t bytes, int site) {
    check_bounds(address, bytes, "write");
    note_write(address, bytes);
    note_banks(address, bytes, site);
    std::memcpy(&shared_[address], in, bytes);
}

void Block::read_matrix_rows(const uint32_t (&rows)[32], uint16_t (&out)[32][8]) {
    // The instruction belongs to the warp. Each row is checked as a read by the lane that gave its address.
    Thread* const self = current;
    for (int lane = 0; lane < 32; ++lane) {
        current = &thread_[self->warp->first_thread + lane];
        check_bounds(rows[lane], 16, "ldmatrix");
        note_read(rows[lane], 16);
        std::memcpy(out[lane], &shared_[rows[lane]], 16);
    }
    current = self;
    if (options_.count_banks) count_wavefronts(rows, ~0u, 16);
}

void Block::copy_async(uint32_t to, const void* from) {
    check_bounds(to, 16, "cp.async");
    if (reinterpret_cast<uintptr_t>(from) % 16) throw Error("misaligned: cp.async from global memory");
    current->copies.push_back({to, from, current->committed_groups});
}

void Block::commit_async() { ++current->committed_groups; }

void Block::wait_async(int pending) {
    Thread& self = *current;
    std::vector<PendingCopy> left;
    for (const PendingCopy& copy : self.copies) {
        if (copy.group >= self.committed_groups - pending) {
            left.push_back(copy);
            continue;
        }
        note_write(copy.to, 16);
        std::memcpy(&shared_[copy.to], copy.from, 16);
        counters.global_bytes_read += 16;
    }
    self.copies = std::move(left);
}

void launch(int blocks, int threads, uint32_t shared_bytes, const Options& options, Counters& counters,
            const std::function<void()>& kernel) {
    Block block(threads, shared_bytes, options, counters);
    for (int index = 0; index < blocks; ++index) block.run(index, kernel);
}

}  // namespace simt
