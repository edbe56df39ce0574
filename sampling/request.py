"""What is asked for: the settings of one call to `sample`, as far as they can be checked without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from diffusion_unet.errors import InputError

from .edit import Picture
from .noise import checked_seed

MAX_SIDE = 16_384  # pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Every prompt with every seed, all pictures of the first prompt first.

    Args:
        prompts: names of classes for a network that has these. None for a network without either, which then draws
            one picture a seed, and for which guidance, having no second half, changes nothing. A prompt longer than the
            text encoder reads is read in chunks.
        negative_prompt: what guidance leads away from; one for all, or one for each prompt.
        seeds: whole numbers from 0 to 2**64 - 1. A seed gives the same picture (to 1/255) in every batch.
        paired: draw prompt i with seed i alone; there are as many of both.
        steps: as A1111 and diffusers count them: network evaluations, of which `heun` takes two a step but for the
            last; twice as many passes where guided. With an image too, all of them are taken.
        solver: any name that `solver_names` knows, or a diffusers scheduler (see `wrap`), which sets its own levels.
        eta: of ddim, euler_a and dpm++2m_sde: how much of the noise is put in anew, 0 to 1; None is the solver's own.
        spacing: where the steps lie, see `levels.sigmas`; None is the solver's or the model's own.
        sigmas: the noise levels themselves, falling, in the place of steps and spacing.
        guidance_scale, guidance_rescale, interval: see `Guidance`; a scale of 1 is no guidance, and costs half.
        size: (height, width) in pixels; None is that of the image, or the one that the model was trained for.
        image, mask, strength: what is drawn from, see `source_of`; where sigmas are given, the strength says no more
            than whether all of the picture goes (1).
        rng, variation_seed, variation_strength: where noise comes from, see `noise_of`.
        exact: one picture a pass, so that each is, to the bit, the picture that its seed gives alone.
        batch_size: pictures that go through the network at once.
        tile: see `LatentCodec.decode`.

    Raises InputError, one line, for seeds, a batch size or a number of prompts that cannot be.
    """

    prompts: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] = ""
    seeds: Sequence[int] = (0,)
    paired: bool = False
    steps: int = 20
    solver: Any = "dpm++2m"
    eta: float | None = None
    spacing: str | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float = 4.0
    guidance_rescale: float = 0.0
    interval: tuple[float | None, float | None] = (None, None)
    size: tuple[int, int] | None = None
    image: Picture | None = None
    mask: Picture | None = None
    strength: float | None = None
    rng: str = "philox"
    variation_seed: int | None = None
    variation_strength: float = 0.0
    exact: bool = False
    batch_size: int = 16
    tile: int | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.batch_size) or self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size!r}: a whole number of at least 1 is needed")
        if not len(self.seeds):
            raise InputError("there is no seed: give at least one")
        for seed in self.seeds:
            checked_seed(seed)
        for name, given in (("prompts", self.prompts), ("negative_prompt", self.negative_prompt)):
            if not isinstance(given, str | Sequence | None):
                raise InputError(f"{name} is {given!r}: a text, or a list of texts, is needed")
        for text in (*self.texts, *self.negatives):
            if not isinstance(text, str):
                raise InputError(f"prompt {text!r} is no text")
        if not isinstance(self.negative_prompt, str) and len(self.negatives) != len(self.texts):
            raise InputError(
                f"there are {len(self.negatives)} negative prompts and {len(self.texts)} prompts: give one for all, or"
                " one for each"
            )
        if self.paired and max(1, len(self.texts)) != len(self.seeds):
            raise InputError(
                f"there are {len(self.texts)} prompts and {len(self.seeds)} seeds: paired needs as many of both"
            )

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts or ())

    @property
    def negatives(self) -> list[str]:
        """A negative prompt for each prompt."""
        if isinstance(self.negative_prompt, str):
            return [self.negative_prompt] * max(1, len(self.texts))
        return list(self.negative_prompt)

    def pictures(self) -> list[tuple[str | None, str, int]]:
        """Prompt (None without text), negative prompt and seed of each."""
        prompts: list[str | None] = [*self.texts] or [None]
        pairs = list(zip(prompts, self.negatives, strict=True))
        seeds = [int(seed) for seed in self.seeds]
        if self.paired:
            return [(*pair, seed) for pair, seed in zip(pairs, seeds, strict=True)]
        return [(*pair, seed) for pair in pairs for seed in seeds]


def is_whole(value: object) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)
