"""From a prompt to a picture: solvers as tables of coefficients, one loop that runs them, classifier-free guidance."""

from .sampler import draw, sample

__all__ = ["draw", "sample"]
