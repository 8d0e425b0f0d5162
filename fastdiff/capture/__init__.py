"""Any function of tensors as one replay: recordings, loops of them, and what they depend on."""

from fastdiff.capture.cache import LoopCache, cache_of, captures
from fastdiff.capture.check import Finding, check_capturable
from fastdiff.capture.cuda import CudaRecording
from fastdiff.capture.dry_run import DryRecording
from fastdiff.capture.fingerprint import NetworkWatch, leaf_key, modes
from fastdiff.capture.loop import Loop
from fastdiff.capture.recording import NotCapturable

__all__ = [
    "CudaRecording",
    "DryRecording",
    "Finding",
    "Loop",
    "LoopCache",
    "NetworkWatch",
    "NotCapturable",
    "cache_of",
    "captures",
    "check_capturable",
    "leaf_key",
    "modes",
]
