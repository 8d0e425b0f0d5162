#include "haar_kernel.h"

namespace fastdiff::cuda {

template const char* launch<HaarOp::split>(const Haar& haar, double* losses, void* stream);

}  // namespace fastdiff::cuda
