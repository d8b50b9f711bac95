"""Whether this installation has the norms' kernels in C; without them the norms run by their definitions."""

from norms.fast.kernels import AVAILABLE

__all__ = ["AVAILABLE"]
