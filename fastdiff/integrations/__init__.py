"""fastdiff behind the interfaces of other packages: one room a package, none imported before use.

Importing this registers them (`fastdiff.frameworks`), in the order in which they are asked.
"""

from fastdiff.integrations import diffusers, edm, k_diffusion

__all__ = ["diffusers", "edm", "k_diffusion"]
