// The Haar ops on the CPU.
#include "../haar.h"

namespace fastdiff::cpu {

constexpr int64_t kTileElements = 4096;  // of the image: its coefficients stay in the first cache

// Tiles of rows x columns = kTileElements, both powers of two and multiples of 2^levels, as wide as the image allows.
struct TileGrid {
  int64_t rows, columns, down, across;

  explicit TileGrid(const Haar& haar) : columns(kTileElements >> haar.levels) {
    while (columns / 2 >= haar.width && columns >> haar.levels > 1) columns /= 2;
    rows = kTileElements / columns;
    down = (haar.height + rows - 1) / rows;
    across = (haar.width + columns - 1) / columns;
  }
};

}  // namespace fastdiff::cpu

#define FASTDIFF_KERNEL "haar_kernel.h"
#include "every_target.h"

namespace fastdiff::cpu {

int64_t haar_tiles(const Haar& haar) {
  const TileGrid grid(haar);
  return haar.batch * haar.channels * grid.down * grid.across;
}

int64_t haar_tile_elements(const Haar& haar) {
  const TileGrid grid(haar);
  return (haar.height < grid.rows ? haar.height : grid.rows) * (haar.width < grid.columns ? haar.width : grid.columns);
}

void haar(const Haar& haar, HaarOp op, int64_t begin, int64_t end, double* losses) {
  static const auto run = chosen_run();
  run(haar, op, begin, end, losses);
}

}  // namespace fastdiff::cpu
