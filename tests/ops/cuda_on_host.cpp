// Runs the threads of a launch and checks them. An error of the launch, as cudaGetLastError gives it, is
//   an exchange that a lane of the warp does not take part in, a barrier that a thread of the block misses;
//   an access outside the memory that the test has given, at an address that is no multiple of its size, or to shared
//   memory that nobody wrote;
//   two threads at one byte, one of them writing, without a barrier between.
// The compiler tells of accesses: .cu files are compiled with -fsanitize=thread, whose functions are here.
#include "cuda_on_host.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx;
// Where this library's variables begin and end: shared memory is among them.
extern "C" __attribute__((visibility("hidden"))) char __bss_start, _end;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class State { ready, exchange, barrier, done };

struct Fibre {
  ucontext_t context;
  State state;
  void* value;  // of an exchange
  size_t bytes;
  int bits;
  std::vector<char> stack = std::vector<char>(kStack);
};

uintptr_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

// The last one who read or wrote a byte.
constexpr int kNone = -2, kSeveral = -1;
struct Access {
  int block = kNone, thread = kNone, epoch = 0;
};
struct Byte {
  Access read, write;
};

struct Memory {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  std::vector<Byte> byte = std::vector<Byte>(end - begin);

  bool holds(uintptr_t at, size_t bytes) const { return at >= begin && at + bytes <= end; }
};

std::vector<Fibre> fibres;
ucontext_t scheduler;
Fibre* running = nullptr;  // null: the host
int block, thread, epoch;  // of the running one; epoch: barriers of its block so far
void (*body)(const void*);
const void* call;
size_t call_bytes;
std::vector<Memory> memories;
Memory shared = {address(&__bss_start), address(&_end), true};
std::string error, told;

std::string name(const Access& who) {
  const auto number = [](int i) { return i == kSeveral ? "several" : std::to_string(i); };
  return "block " + number(who.block) + ", thread " + number(who.thread);
}

void stop(State state) {
  running->state = state;
  swapcontext(&running->context, &scheduler);
}

// The running thread's error; it does not go on.
void fail(const std::string& what) {
  if (error.empty()) error = name({block, thread}) + " " + what;
  stop(State::done);
}

// -- accesses -------------------------------------------------------------------------------------------------------

// Whether the running thread comes after that access, or is the one who made it.
bool ordered(const Access& before) {
  if (before.block == kNone) return true;
  return before.block == block && (before.thread == thread || before.epoch < epoch);
}

void note(Access& access) {
  if (ordered(access)) access = {block, thread, epoch};
  else access = {access.block == block ? block : kSeveral, kSeveral, epoch};
}

void check(uintptr_t at, size_t bytes, bool writes) {
  if (!running) return;
  const auto within = [&](const void* data, size_t size) {
    return at >= address(data) && at + bytes <= address(data) + size;
  };
  if (within(running->stack.data(), kStack)) return;
  if (!writes && (within(call, call_bytes) || at == address(&threadIdx.x) || at == address(&blockIdx.x))) return;
  const auto what = [&] { return (writes ? "writes " : "reads ") + std::to_string(bytes) + " bytes "; };
  const auto holds = [&](const Memory& m) { return m.holds(at, bytes) && (m.writable || !writes); };
  const auto found = std::find_if(memories.begin(), memories.end(), holds);
  if (found == memories.end() && !holds(shared)) return fail(what() + "that are not its own");
  Memory& memory = found == memories.end() ? shared : *found;
  if (at % (bytes & -bytes)) return fail(what() + "at an address that is no multiple of it");
  for (uintptr_t i = 0; i < bytes; ++i) {
    Byte& byte = memory.byte[at - memory.begin + i];
    if (&memory == &shared && !writes && byte.write.block == kNone) return fail(what() + "that nobody wrote");
    if (!ordered(byte.write)) return fail(what() + "that " + name(byte.write) + " writes");
    if (writes && !ordered(byte.read)) return fail(what() + "that " + name(byte.read) + " reads");
    note(writes ? byte.write : byte.read);
  }
}

// -- a block --------------------------------------------------------------------------------------------------------

void begin(Fibre& fibre) {
  getcontext(&fibre.context);
  fibre.context.uc_stack = {fibre.stack.data(), 0, kStack};
  const auto thread = [] {
    body(call);
    stop(State::done);
  };
  makecontext(&fibre.context, thread, 0);
  fibre.state = State::ready;
}

void resume(int number) {
  threadIdx.x = thread = number;
  running = &fibres[number];
  swapcontext(&scheduler, &running->context);
  running = nullptr;
}

// Of threads that all wait or have returned: whether those of this warp exchanged values.
bool exchange_within(int first) {
  Fibre* const lane = &fibres[first];
  const auto waits = [](const Fibre& f) { return f.state == State::exchange; };
  if (std::none_of(lane, lane + kWarp, waits)) return false;
  const Fibre& asks = *std::find_if(lane, lane + kWarp, waits);
  for (int i = 0; i < kWarp && error.empty(); ++i) {
    const bool same = waits(lane[i]) && lane[i].bits == asks.bits && lane[i].bytes == asks.bytes;
    if (!same) error = name({block, first + i}) + " misses an exchange of its warp";
  }
  if (!error.empty()) return false;
  std::vector<std::vector<char>> given;
  for (int i = 0; i < kWarp; ++i) {
    const char* value = static_cast<const char*>(lane[i].value);
    given.emplace_back(value, value + lane[i].bytes);
  }
  for (int i = 0; i < kWarp; ++i) {
    std::memcpy(lane[i].value, given[i ^ lane[i].bits].data(), lane[i].bytes);
    lane[i].state = State::ready;
  }
  return true;
}

// Of threads that all wait at a barrier or have returned: whether any goes on.
bool pass_barrier() {
  const auto waits = [](const Fibre& f) { return f.state == State::barrier; };
  if (std::none_of(fibres.begin(), fibres.end(), waits)) return false;
  for (size_t i = 0; i < fibres.size() && error.empty(); ++i)
    if (!waits(fibres[i])) error = name({block, static_cast<int>(i)}) + " misses a barrier of its block";
  for (Fibre& fibre : fibres) fibre.state = State::ready;
  ++epoch;
  return error.empty();
}

std::vector<int> any_order(size_t count) {
  static std::mt19937 generator;
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  return order;
}

void run_block() {
  const std::vector<int> order = any_order(fibres.size());
  for (Fibre& fibre : fibres) begin(fibre);
  epoch = 0;
  bool go_on = true;
  while (go_on) {
    for (int number : order) {
      if (fibres[number].state == State::ready) resume(number);
      if (!error.empty()) return;
    }
    go_on = false;
    for (size_t first = 0; first < fibres.size() && error.empty(); first += kWarp) go_on |= exchange_within(first);
    if (!go_on && error.empty()) go_on = pass_barrier();
  }
}

}  // namespace

cudaError_t cudaGetLastError() {
  told = std::exchange(error, {});
  return told.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
const char* cudaGetErrorString(cudaError_t) { return told.c_str(); }

void __syncthreads() { stop(State::barrier); }

void cuda_on_host::exchange(unsigned lanes, void* value, size_t bytes, int bits) {
  if (lanes != 0xFFFFFFFFu || bits < 0 || bits >= kWarp) return fail("exchanges with lanes that there are not");
  running->value = value;
  running->bytes = bytes;
  running->bits = bits;
  stop(State::exchange);
}

void cuda_on_host::launch(
    const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* from, size_t bytes) {
  if (!error.empty()) return;
  const unsigned threads = config.blockDim.x;
  if (!config.gridDim.x || config.gridDim.x >> 31 || !threads || threads > 1024 || threads % kWarp) {
    error = "invalid configuration";
    return;
  }
  fibres.resize(threads);
  body = thread;
  call = from;
  call_bytes = bytes;
  for (Memory& memory : memories) std::fill(memory.byte.begin(), memory.byte.end(), Byte{});
  for (int number : any_order(config.gridDim.x)) {
    blockIdx.x = block = number;
    std::fill(shared.byte.begin(), shared.byte.end(), Byte{});
    run_block();
    if (!error.empty()) return;
  }
}

// -- what the compiler and the test call ----------------------------------------------------------------------------

extern "C" {

#define ACCESS(bytes)                                                           \
  void __tsan_read##bytes(const void* at) { check(address(at), bytes, false); } \
  void __tsan_write##bytes(void* at) { check(address(at), bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(const void* at, size_t bytes) { check(address(at), bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { check(address(at), bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// The memory of the launches from now on, beside what they had.
void give(const void* data, size_t bytes, bool writable) {
  memories.push_back({address(data), address(data) + bytes, writable});
}
void take_back() { memories.clear(); }
}
