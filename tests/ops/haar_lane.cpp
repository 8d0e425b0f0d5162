// Runs what one thread of the CUDA kernels does, for every thread of a launch, on the CPU. Lanes of a warp that exchange
// values are threads that wait for each other; others run one after the other.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "cuda/haar_lane.h"

using namespace fastdiff;

namespace {

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ == cuda::kWarp) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round != round_; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int waiting_ = 0, round_ = 0;
};

struct Exchange {
  Barrier barrier;
  double value[cuda::kWarp];
};

struct Warp {
  Exchange* exchange;
  int lane;

  template <class T>
  T swap(T value, int mask) const {
    exchange->value[lane] = value;
    exchange->barrier.wait();
    const T other = static_cast<T>(exchange->value[lane ^ mask]);
    exchange->barrier.wait();
    return other;
  }
};

template <class S, int K, bool kVector>
void run_lane(const Haar& haar, HaarOp op, double* losses, int64_t block, int thread, Exchange* exchange) {
  Warp warp{exchange, thread % cuda::kWarp};
  const cuda::Grid grid(haar);
  cuda::Lane<S, K, kVector, Warp> lane(haar, warp, grid, block, thread);
  switch (op) {
    case HaarOp::split: return lane.run_split();
    case HaarOp::merge: return lane.run_merge();
    case HaarOp::step: return lane.run_step();
    case HaarOp::expand: return lane.run_expand();
    case HaarOp::loss: return lane.run_loss(losses, block, thread);
  }
}

template <class S, int K, bool kVector>
void launch(const Haar& haar, HaarOp op, double* losses) {
  const cuda::Grid grid(haar);
  for (int64_t block = 0; block < haar.batch * grid.blocks; ++block) {
    for (int first = 0; first < cuda::kThreads; first += cuda::kWarp) {
      Exchange exchange;
      if (grid.across == 0 && op != HaarOp::loss) {
        for (int i = 0; i < cuda::kWarp; ++i) run_lane<S, K, kVector>(haar, op, losses, block, first + i, &exchange);
        continue;
      }
      std::vector<std::thread> lanes;
      for (int i = 0; i < cuda::kWarp; ++i)
        lanes.emplace_back(run_lane<S, K, kVector>, std::cref(haar), op, losses, block, first + i, &exchange);
      for (std::thread& lane : lanes) lane.join();
    }
  }
}

template <class S, bool kVector>
void launch_levels(const Haar& haar, HaarOp op, double* losses) {
  switch (haar.levels) {
    case 0: return launch<S, 0, kVector>(haar, op, losses);
    case 1: return launch<S, 1, kVector>(haar, op, losses);
    case 2: return launch<S, 2, kVector>(haar, op, losses);
    default: return launch<S, 3, kVector>(haar, op, losses);
  }
}

Image image_of(void* data, int type, const Haar& haar, bool channels_last) {
  const int64_t c = haar.channels, h = haar.height, w = haar.width;
  if (channels_last) return {data, Type(type), c * h * w, 1, w * c, c};
  return {data, Type(type), c * h * w, h * w, w, 1};
}

}  // namespace

// Dense tensors all; losses: [batch]. Returns whether the aligned path served.
extern "C" __attribute__((visibility("default"))) int run_haar(
    int op, int levels, int64_t batch, int64_t channels, int64_t height, int64_t width, int type, int score_type,
    int channels_last, void* image, void* score, void* result, void* flat, void* coefficients, int row_per_sample,
    void* seeds, void* stage, void* upstream, double* losses) {
  Haar haar{};
  haar.levels = levels;
  haar.batch = batch;
  haar.channels = channels;
  haar.height = height;
  haar.width = width;
  haar.is_double = Type(type) == Type::f64;
  if (image) haar.image = image_of(image, type, haar, channels_last);
  if (score) haar.score = image_of(score, score_type, haar, channels_last);
  if (result) haar.result = image_of(result, type, haar, channels_last);
  if (flat) lay_out(haar, flat, Type(type), channels_last);
  if (HaarOp(op) == HaarOp::expand) {  // flat is the coarse image alone
    const int64_t h = side(height, 1), w = side(width, 1);
    haar.coarse = channels_last ? Image{flat, Type(type), channels * h * w, 1, w * channels, channels}
                                : Image{flat, Type(type), channels * h * w, h * w, w, 1};
    haar.details[0] = {};
  }
  haar.coefficients = coefficients;
  haar.row_per_sample = row_per_sample;
  haar.seeds = static_cast<const int64_t*>(seeds);
  haar.stage = static_cast<const int32_t*>(stage);
  haar.purpose = HaarOp(op) == HaarOp::expand ? kExpansionNoise : kPyramidNoise;
  haar.upstream = upstream;
  const int64_t warps = cuda::Grid(haar).blocks * cuda::kThreads / cuda::kWarp;
  std::vector<double> partial(batch * warps);
  const bool vector = cuda::vectorizable(haar);
  if (haar.is_double)
    launch_levels<double, false>(haar, HaarOp(op), partial.data());
  else if (vector)
    launch_levels<float, true>(haar, HaarOp(op), partial.data());
  else
    launch_levels<float, false>(haar, HaarOp(op), partial.data());
  for (int64_t i = 0; losses && i < batch; ++i) {
    losses[i] = 0;
    for (int64_t k = 0; k < warps; ++k) losses[i] += partial[i * warps + k];
  }
  return vector;
}
