// Noise of single images; every_target.h includes this file once for each instruction set. No include guard, and no
// includes here.

// 4 * blocks normals of one image, from element 4 * first_block on.
FASTDIFF_TARGET inline __attribute__((noinline)) void normal_blocks(
    uint64_t seed, uint32_t stage, uint32_t purpose, uint64_t first_block, int64_t blocks, float* to) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t low = static_cast<uint32_t>(first_block), high = static_cast<uint32_t>(first_block >> 32);
  uint32_t counter = low;
  for (const float* const end = to + 4 * blocks; to != end; to += 4, ++counter) {
    uint32_t word[4] = {counter, high + (counter < low), stage, purpose};
    philox4x32(word, k0, k1);
    const Pair a = box_muller(word[0], word[1]), b = box_muller(word[2], word[3]);
    to[0] = a.first;
    to[1] = a.second;
    to[2] = b.first;
    to[3] = b.second;
  }
}

// The normals of the logical elements [first, first + count); the buffer holds up to six more.
FASTDIFF_TARGET inline const float* normals(
    uint64_t seed, uint32_t stage, uint32_t purpose, int64_t first, int64_t count, float* buffer) {
  const int64_t block = first / 4;
  normal_blocks(seed, stage, purpose, block, (first + count + 3) / 4 - block, buffer);
  return buffer + (first - 4 * block);
}
