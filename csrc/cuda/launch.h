// What the operators call: launches on a stream. Each returns null, or what CUDA says. No torch, no CUDA headers.
#pragma once

#include "../haar.h"

namespace fastdiff::cuda {

int64_t haar_blocks(const Haar& haar);  // of the launch; may not pass 2^31 - 1
int64_t haar_losses(const Haar& haar);  // numbers that a loss needs room for
const char* haar(const Haar& haar, HaarOp op, double* losses, void* stream);
// A number for each sample from those of a loss.
const char* haar_sum(const Haar& haar, const double* losses, void* sums, void* stream);

}  // namespace fastdiff::cuda
