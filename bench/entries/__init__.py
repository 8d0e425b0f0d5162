"""The entries, one file each with an `ENTRY`; to add one, name its file here. No torch."""

NAMES = (  # in order of worth
    "multistep_step",
    "weighted_sums",
    "seeded_noise",
    "haar",
    "spectral_filter",
    "spectral_update",
    "captured_loop",
    "solver_loop",
    "scheduler_step",
    "sampler_functions",
    "pipeline",
)
