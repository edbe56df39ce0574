"""Names of solvers as people bring them along, and what is said of one that is not known."""

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from diffusion_unet.errors import InputError
from diffusion_unet.solver_names import NAMES, a1111_sampler, solver_named
from sampling.levels import SPACINGS
from sampling.solvers import SOLVERS


@pytest.mark.parametrize(
    ("text", "name", "spacing"),
    [
        ("dpm++2m", "dpm++2m", None),
        ("DPM++ 2M", "dpm++2m", None),
        ("DPM++ 2M Karras", "dpm++2m", "karras"),
        ("dpmpp_2m", "dpm++2m", None),
        ("DPMSolverMultistepScheduler", "dpm++2m", None),
        ("DPM++ 2M SDE", "dpm++2m_sde", None),
        ("DPM++ 2M SDE Exponential", "dpm++2m_sde", "exponential"),
        ("dpmpp-2m-sde", "dpm++2m_sde", None),
        ("sample_dpmpp_2m_sde", "dpm++2m_sde", None),
        ("Euler", "euler", None),
        ("EULER", "euler", None),
        ("EulerDiscreteScheduler", "euler", None),
        ("FlowMatchEulerDiscreteScheduler", "euler", None),
        ("Euler a", "euler_a", None),
        ("euler_ancestral", "euler_a", None),
        ("EulerAncestralDiscreteScheduler", "euler_a", None),
        ("Euler a Beta", "euler_a", "beta"),
        ("Euler Simple", "euler", "simple"),
        ("Heun", "heun", None),
        ("HeunDiscreteScheduler", "heun", None),
        ("UniPC", "unipc", None),
        ("uni_pc", "unipc", None),
        ("UniPCMultistepScheduler", "unipc", None),
        ("DDIM uniform", "ddim", "linspace"),
        ("DDIMScheduler", "ddim", None),
        ("DDPM", "ddpm", None),
        ("DDPMScheduler", "ddpm", None),
        ("LCM", "lcm", "trailing"),
        ("LCMScheduler", "lcm", "trailing"),
        ("LCM Karras", "lcm", "karras"),
        ("ddim leading", "ddim", "leading"),
    ],
)
def test_names(text: str, name: str, spacing: str | None) -> None:
    assert solver_named(text) == (name, spacing)


def test_the_names_are_the_solvers() -> None:
    assert set(NAMES) == set(SOLVERS)
    for name in NAMES:
        assert solver_named(name)[0] == name and solver_named(a1111_sampler(name))[0] == name
        for spacing in SPACINGS:
            assert solver_named(f"{a1111_sampler(name)} {spacing.title()}") == (name, spacing)
    assert a1111_sampler("euler_a") == "Euler a" and a1111_sampler("dpm++2m") == "DPM++ 2M"
    assert a1111_sampler("my own") == "my own"


def test_every_class_name_is_one_of_diffusers() -> None:
    from diffusion_unet.solver_names import _SPELLINGS

    for spellings in _SPELLINGS.values():
        for spelling in spellings:
            if spelling.endswith(("Discrete", "Multistep", "Parallel", "EDMEuler")):
                assert hasattr(diffusers, f"{spelling}Scheduler"), spelling


@pytest.mark.parametrize(
    ("text", "near"),
    [("eulr", "euler?"), ("DPM++ 2M SDE Heun", None), ("uni_pd", "unipc?"), ("zzz", None), ("", None), ("a\nb", None)],
)
def test_unknown_names(text: str, near: str | None) -> None:
    with pytest.raises(InputError) as error:
        solver_named(text)
    said = str(error.value)
    assert "\n" not in said and all(name in said for name in NAMES)
    assert near is None or f"did you mean {near}" in said


def test_other_methods_are_not_taken_for_one_of_these() -> None:
    for text in (
        "DPM2",
        "DPM2 a",
        "DPM++ 2S a",
        "DPM++ SDE",
        "DPM++ 3M SDE",
        "DPM++ 2M SDE Heun Karras",
        "LMS",
        "PLMS",
    ):
        with pytest.raises(InputError):
            solver_named(text)
    with pytest.raises(InputError):
        solver_named(3)  # type: ignore[arg-type]


def test_no_torch_is_imported() -> None:
    code = "import sys, diffusion_unet.solver_names; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0
