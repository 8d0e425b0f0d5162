"""Networks as other projects build them, behind the one call that the sampler makes.

A family is a subclass of `NetworkDenoiser` in a package of `fastdiff/integrations/`.
"""

from fastdiff.denoisers.network import NetworkDenoiser, named, uncompiled, unpacked, wrap

__all__ = ["NetworkDenoiser", "named", "uncompiled", "unpacked", "wrap"]
