"""Any function of tensors as one replay: recordings, loops of them, and what they depend on."""

from fastdiff.capture.cache import MEASURED_STAGES, LoopCache, cache_of, captures
from fastdiff.capture.check import Finding, check_capturable
from fastdiff.capture.fingerprint import leaf_key, network_state
from fastdiff.capture.loop import Loop, Stages
from fastdiff.capture.recordings import CpuRecording, CudaRecording, NotCapturable

__all__ = [
    "MEASURED_STAGES",
    "CpuRecording",
    "CudaRecording",
    "Finding",
    "Loop",
    "LoopCache",
    "NotCapturable",
    "Stages",
    "cache_of",
    "captures",
    "check_capturable",
    "leaf_key",
    "network_state",
]
