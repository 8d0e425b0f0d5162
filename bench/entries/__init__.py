"""The entries of the registry, one file each."""
