"""What solvers are called: here, in A1111's web interface, in diffusers, ComfyUI and k-diffusion. Imports no torch."""

import difflib
import re

from .errors import InputError

__all__ = ["NAMES", "SPACINGS", "a1111_sampler", "solver_named"]

# Canonical name: how A1111 spells it in a picture's `parameters`, and what else it is called. "DPM++ 2M SDE Heun" and
# DPM2 are other methods.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "dpm++2m": ("DPM++ 2M", "dpm 2m", "k_dpmpp_2m", "DPMSolverMultistep", "EDMDPMSolverMultistep"),
    "dpm++2m_sde": ("DPM++ 2M SDE", "dpm 2m sde", "k_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    "unipc": ("UniPC", "uni_pc_bh2", "UniPCMultistep"),
    "ddim": ("DDIM", "DDIMParallel"),
    "euler": ("Euler", "k_euler", "EulerDiscrete", "EDMEuler", "FlowMatchEulerDiscrete"),
    "euler_a": ("Euler a", "euler_ancestral", "k_euler_a", "k_euler_ancestral", "EulerAncestralDiscrete"),
    "heun": ("Heun", "k_heun", "HeunDiscrete", "FlowMatchHeunDiscrete"),
    "lcm": ("LCM",),
    "ddpm": ("DDPM", "DDPMParallel"),
}
NAMES = tuple(_SPELLINGS)

# The endings that name the spacing of the steps: those of `sampling.levels`, and A1111's and ComfyUI's words.
SPACINGS = ("trailing", "leading", "linspace", "simple", "karras", "exponential", "beta")
_SPACINGS = {word: word for word in SPACINGS}
_SPACINGS |= {"uniform": "linspace", "normal": "linspace"}


def _key(text: str) -> str:
    """Without case, spaces and punctuation, ++ being pp."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "p")).removesuffix("scheduler").removeprefix("sample")


_KEYS = {_key(spelling): name for name, spellings in _SPELLINGS.items() for spelling in (name, *spellings)}


def solver_named(text: str) -> tuple[str, str | None]:
    """(canonical name, spacing) of a solver by any of its names, "DPM++ 2M Karras" or "EulerDiscreteScheduler".

    The spacing is the one that the text ends with; None, the model's own, where it ends with none. But for lcm, which
    is then trailing: the timesteps that its networks were distilled at.

    Raises InputError, which lists the names and suggests the nearest.
    """
    key = _key(text) if isinstance(text, str) else ""
    spacing = None
    if key not in _KEYS:
        spacing = next((known for word, known in _SPACINGS.items() if key.endswith(word)), None)
        key = next((key.removesuffix(word) for word in _SPACINGS if key.endswith(word)), key)
    if key not in _KEYS:
        near = difflib.get_close_matches(key, _KEYS, 1)
        meant = f", did you mean {_KEYS[near[0]]}?" if near else ":"
        raise InputError(f"solver {ascii(text)[:80]} is not known{meant} {', '.join(NAMES)}")
    name = _KEYS[key]
    return name, "trailing" if name == "lcm" and spacing is None else spacing


def a1111_sampler(solver: str) -> str:
    """How A1111 spells it in `parameters`; a name that is not known here stays as it is."""
    return _SPELLINGS[solver][0] if solver in _SPELLINGS else solver
