// fastdiff._C: importing it registers the operators of ops.cpp; build_info() says how they were built.
#undef TORCH_TARGET_VERSION  // torch 2.11 guards every header it brings with this, pybind11's too
#include <pybind11/pybind11.h>

#include "common.h"
#include "fastdiff_sources.h"  // written by setup.py

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch_target"] = FASTDIFF_TORCH_TARGET;
    info["cuda"] = FASTDIFF_CUDA_VERSION;
    info["cpu_target"] = fastdiff::cpu::target_name();
    info["sources"] = FASTDIFF_SOURCES;
    return info;
  });
}
