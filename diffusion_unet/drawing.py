"""The verbs `sample` and `replay`, and what else the command line draws: like cli.py a place where siblings meet."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_unet import sibling
from diffusion_unet.arguments import plain
from diffusion_unet.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from diffusion_unet.model import DiffusionModel

MAX_GRID = 400  # pictures
SETTINGS = (
    "steps", "guidance_scale", "guidance_rescale", "interval", "solver", "eta", "spacing", "negative_prompt", "size",
    "batch_size",
)  # fmt: skip
SAMPLE_SETTINGS = (
    "sigmas", "image", "mask", "strength", "rng", "variation_seed", "variation_strength", "exact", "tile",
)  # fmt: skip


class _Cell(NamedTuple):
    """A picture to be drawn. number: of its prompt, in the names of files."""

    number: int
    prompt: str
    negative_prompt: str
    seed: int


def settings_of(arguments: argparse.Namespace, names: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """The settings of `sampling.Request` that a command line gives."""
    return {name: getattr(arguments, name) for name in names}


def load(folder: str | Path, device: str | None = None, dtype: str | None = None) -> "DiffusionModel":
    """A model on its device, cuda where there is one and none is named. Raises InputError."""
    import torch

    from diffusion_unet.model import DiffusionModel

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        there = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, ImportError):  # which it is depends on how torch was built
        there = False
    if not there:
        raise InputError(f"--device: {device} is not to be had here: leave it out, or give cpu")
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return DiffusionModel.load(folder, device=device, dtype=None if dtype is None else kinds[dtype])


def draw(model: "DiffusionModel", prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list["Image"]:
    """`sampling.sample` with a progress bar."""
    sibling("sampling")
    from tqdm import tqdm

    from sampling import sample

    with tqdm(desc="drawing", unit="step", leave=False, disable=None) as bar:  # None: shown on a terminal only

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return sample(model, prompts or None, seeds=seeds, progress=progress, **settings)


def sample(arguments: argparse.Namespace) -> None:
    """The verb."""
    from diffusion_unet.images import first_free, grid, save_png

    settings = settings_of(arguments, (*SETTINGS, *SAMPLE_SETTINGS))
    folder = Path(arguments.out)
    first = first_free(folder)
    cells = _cells(arguments, first)
    del settings["negative_prompt"]  # a cell has its own
    model = load(arguments.model, arguments.device, arguments.dtype)
    model_hash = model.fingerprint()
    drawn_from = _adapted(model, arguments)
    if arguments.compile:
        drawn_from.unet.compile()
    kept = 0

    def keep(image: "Image") -> None:
        nonlocal kept
        save_png(folder / f"{cells[kept].number:05d}-{cells[kept].seed}.png", image)
        kept += 1

    try:
        images = draw(
            drawn_from,
            [cell.prompt for cell in cells] if model.text is not None or any(cell.prompt for cell in cells) else [],
            [cell.seed for cell in cells],
            negative_prompt=[cell.negative_prompt for cell in cells] if model.text is not None else "",
            paired=True,
            model_name=arguments.model,
            model_hash=model_hash,
            watch=None if arguments.preview is None else _Frames(Path(arguments.preview), cells),
            finished=keep,
            say=lambda line: print(line, file=sys.stderr),
            **settings,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {kept} of {len(cells)} pictures are kept in {folder}") from None
    rows: dict[int, list[_Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.number, []).append(cell)
    columns = {len(row) for row in rows.values()}
    told = f"Pictures: {len(images)} in {folder}"
    if len(columns) == 1 and len(cells) <= MAX_GRID:
        sheet = folder / "grid.png"
        if sheet.exists():  # of an earlier call
            sheet = folder / f"grid-{first:05d}.png"
        save_png(sheet, grid(images, [row[0].prompt for row in rows.values()], columns.pop()), {})
        told += f", all together in {sheet}"
    print(told)


def replay(arguments: argparse.Namespace) -> None:
    """The verb. Raises InputError where the picture drawn again is another one, by more than 1/255."""
    from diffusion_unet.images import save_png

    sibling("sampling")
    from sampling.replay import replay as draw_again

    picture = Path(arguments.picture)
    result = draw_again(
        picture,
        model=None if arguments.model is None else Path(arguments.model),
        files=[Path(file) for file in arguments.file],
        device=arguments.device,
    )
    if arguments.out is not None:
        save_png(Path(arguments.out), result.image)
    line = plain(f"{picture}: {result}")
    if not result.same:
        raise InputError(line)
    print(line)


def _cells(arguments: argparse.Namespace, first: int) -> list[_Cell]:
    """All pictures in order: every prompt with every seed, but those of a file that have a seed of their own."""
    from diffusion_unet.prompt_files import DRAWN, read_prompts

    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in arguments.prompts]
    if arguments.prompts_file is not None:
        rows += read_prompts(Path(arguments.prompts_file), DRAWN)
    return [
        _Cell(number, row["prompt"], row.get("negative_prompt", arguments.negative_prompt), seed)
        for number, row in enumerate(rows or [{"prompt": ""}], first)
        for seed in ([row["seed"]] if "seed" in row else arguments.seeds)
    ]


def _adapted(model: "DiffusionModel", arguments: argparse.Namespace) -> "DiffusionModel":
    """The model with the adapters that the command line names. Raises InputError."""
    sibling("sampling")
    from sampling.adapters import Control, ImagePrompt, Lora, with_adapters

    if len(arguments.controlnet) != len(arguments.control_image):
        raise InputError("--controlnet: each needs a --control-image, and each of those a --controlnet")
    prompt = None
    if arguments.ip_adapter is not None:
        if arguments.ip_adapter_encoder is None or arguments.ip_adapter_image is None:
            raise InputError("--ip-adapter: needs --ip-adapter-encoder and --ip-adapter-image")
        prompt = ImagePrompt.parse(arguments.ip_adapter, arguments.ip_adapter_encoder, arguments.ip_adapter_image)
    pairs = zip(arguments.controlnet, arguments.control_image, strict=True)
    return with_adapters(
        model,
        loras=[Lora.parse(text) for text in arguments.lora],
        controlnets=[Control.parse(folder, image) for folder, image in pairs],
        ip_adapter=prompt,
        size=arguments.size,
    )


class _Frames:
    """Writes what the pictures of a batch are expected to become, step by step: FOLDER/NUMBER-SEED-STEP.png."""

    def __init__(self, folder: Path, cells: Sequence[_Cell]) -> None:
        self._folder, self._cells = folder, cells
        self._steps: dict[int, int] = {}  # done, by the batch's first picture

    def __call__(self, first: int, pictures: "np.ndarray") -> None:
        from diffusion_unet.images import save_png

        step = self._steps[first] = self._steps.get(first, 0) + 1
        for cell, picture in zip(self._cells[first:], pictures, strict=False):
            save_png(self._folder / f"{cell.number:05d}-{cell.seed}-{step:03d}.png", picture)
