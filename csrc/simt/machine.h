// A small SIMT machine on the CPU. It emulates enough of a GPU's multiprocessor to run the kernels of
// csrc/include/crate thread for thread, and it reports more of their mistakes than the hardware.
//
// - Every thread of a block is a fiber with its own stack. The blocks of a grid run one after the other.
// - A fiber runs until it reaches a collective. At a warp collective (mma, ldmatrix, shuffle ...) all lanes meet, and
//   the last lane to arrive computes the result for all 32. A block barrier waits for every thread of the block.
// - In order, warps run one after the other, each as far as it can. With `shuffle_seed` the scheduler draws which warp
//   runs, for how long, and in which order of lanes. Code without a needed barrier then computes something else.
// - Shared memory starts uninitialized. The machine records for each 32-bit word who wrote and read it last, and in
//   which barrier epoch. With `check_races` it reports a read of a word that was never written, and two accesses by
//   different threads without a barrier between them if one is a write. It also reports out-of-bounds and misaligned
//   accesses.
// - cp.async copies arrive as late as the program allows: when their group is waited for.
// - A divergent collective, or a barrier that some thread never reaches, is an error and does not hang.
//
// The machine does not model time, caches, registers, and several blocks at once.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace simt {

struct Options {
    uint64_t shuffle_seed = 0;  // 0: in order
    bool check_races = true;
    bool count_banks = false;  // slower: every ordinary shared access is recorded until its block ends
};

struct Counters {
    int64_t global_bytes_read = 0;
    int64_t global_bytes_written = 0;
    int64_t mma = 0;               // warp-wide m16n8k16 products
    int64_t exp2 = 0;              // exponentials, counted per thread
    int64_t barriers = 0;          // block barriers
    int64_t shared_wavefronts = 0;  // passes through shared memory that the accesses take ...
    int64_t bank_conflicts = 0;     // ... and how many of them a conflict-free layout would have saved
};

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Block;
struct Warp;

struct PendingCopy {
    uint32_t to;
    const void* from;
    int group;
};

struct Thread {
    enum State { kReady, kAtWarp, kAtBlock, kDone };
    Block* block;
    Warp* warp;
    int index, lane;
    State state = kReady;
    void* stack_pointer = nullptr;  // while not running
    uint32_t warp_epoch = 0;        // number of warp barriers that the lane has passed
    int committed_groups = 0;
    std::vector<PendingCopy> copies;
    std::map<int, int> site_visits;  // count_banks: number of shared accesses by each source line
};

struct Warp {
    int first_thread;
    int arrived = 0;
    const char* collective = nullptr;
    void* argument[32];
};

class Block {
  public:
    Block(int threads, uint32_t shared_bytes, const Options& options, Counters& counters);
    ~Block();

    void run(int block_index, const std::function<void()>& kernel);

    // Called from within a fiber.
    void sync_block();
    void sync_warp();
    template <class Argument, class Compute>
    void collective(const char* name, Argument& argument, Compute compute);
    void read_shared(uint32_t address, void* out, uint32_t bytes, int site);
    void write_shared(uint32_t address, const void* in, uint32_t bytes, int site);
    // The address of a row of an ldmatrix: checked and counted like any read.
    void read_matrix_rows(const uint32_t (&rows)[32], uint16_t (&out)[32][8]);
    void copy_async(uint32_t to, const void* from);
    void commit_async();
    void wait_async(int pending);

    int block_index = 0;
    const int threads;
    Counters& counters;

  private:
    struct Word {  // the history of one 32-bit word of shared memory; thread -1: never
        int writer = -1, reader = -1;
        uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
        bool many_lanes = false;  // in read_warp_epoch, several lanes of the reader's warp
        bool many_warps = false;  // in read_epoch, several warps
    };
    struct BankRecord {
        uint32_t address[32];
        uint32_t lanes = 0;
        uint32_t bytes;
    };

    static void enter();  // first function of every fiber
    void resume(Thread& thread);
    void pause(Thread::State why);
    bool run_warp(int warp);
    void check_bounds(uint32_t address, uint32_t bytes, const char* what);
    void note_read(uint32_t address, uint32_t bytes);
    void note_write(uint32_t address, uint32_t bytes);
    void note_banks(uint32_t address, uint32_t bytes, int site);
    void count_wavefronts(const uint32_t* address, uint32_t lanes, uint32_t bytes);
    bool ordered(int thread, uint32_t epoch, uint32_t warp_epoch) const;
    [[noreturn]] void race(const char* what, uint32_t address, int other) const;

    const Options options_;
    std::vector<unsigned char> shared_;
    std::vector<Word> words_;
    std::vector<Thread> thread_;
    std::vector<Warp> warp_;
    char* stacks_ = nullptr;
    size_t stack_bytes_;
    const std::function<void()>* kernel_ = nullptr;
    std::exception_ptr failure_;
    void* scheduler_stack_pointer_ = nullptr;
    int at_barrier_ = 0;
    uint32_t epoch_ = 0;
    std::mt19937_64 random_;
    std::map<std::tuple<int, int, int>, BankRecord> banks_;  // by warp, source line, visit

    friend Block& current_block();
};

extern Thread* current;  // the running fiber's thread

inline Block& current_block() { return *current->block; }

// Runs the kernel over a one-dimensional grid.
void launch(int blocks, int threads, uint32_t shared_bytes, const Options& options, Counters& counters,
            const std::function<void()>& kernel);

template <class Argument, class Compute>
void Block::collective(const char* name, Argument& argument, Compute compute) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    if (warp.arrived == 0) warp.collective = name;
    if (warp.collective != name && std::strcmp(warp.collective, name) != 0)
        throw Error("warp " + std::to_string(warp.first_thread / 32) + " diverged: lane " + std::to_string(self.lane) +
                    " is at " + name + " while others are at " + warp.collective);
    warp.argument[self.lane] = &argument;
    if (++warp.arrived < 32) return pause(Thread::kAtWarp);
    warp.arrived = 0;
    compute(reinterpret_cast<Argument* const(&)[32]>(warp.argument));
    for (int lane = 0; lane < 32; ++lane) thread_[warp.first_thread + lane].state = Thread::kReady;
}

}  // namespace simt
