"""fastdiff behind the interfaces of other packages, which are imported here and nowhere else."""
