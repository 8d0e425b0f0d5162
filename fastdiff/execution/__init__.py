"""Runs a tableau over a denoiser: its numbers and buffers on a device, stage by stage."""
