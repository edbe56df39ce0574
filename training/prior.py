"""Images of a subject's class, drawn by the model before it is trained, so that it keeps them (DreamBooth).

Ruiz et al. 2022, arXiv:2208.12242, section 3.2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_unet.errors import InputError
from diffusion_unet.images import save_png
from diffusion_unet.model import DiffusionModel

from .config import Config
from .engine import by_main, heed, heeding
from .folders import IMAGE_SUFFIXES
from .network import load_pretrained

AT_ONCE = 16


def fill_class_images(
    config: Config,
    accelerator: Any,
    preview: Callable[[DiffusionModel, list[str], list[int]], list[Any]] | None,
    say: Callable[[str], None],
) -> None:
    """Draws what `class_data_dir` lacks of `num_class_images`, by the main process, each image from a seed of its own.

    Raises InputError where images are missing and cannot be drawn."""
    data = config.data
    if data.class_data_dir is None:
        return
    folder = Path(data.class_data_dir)

    def fill() -> None:
        found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES] if folder.is_dir() else []
        missing = [seed for seed in range(data.num_class_images) if not (folder / f"class-{seed:05d}.png").exists()]
        missing = missing[: max(0, data.num_class_images - len(found))]
        if missing and (preview is None or config.model.pretrained is None):
            raise InputError(
                f"data.class_data_dir: {folder} has {len(found)} images, and data.num_class_images is"
                f" {data.num_class_images}: put more there, or lower it"
            )
        if missing and preview is not None:
            say(f"drawing {len(missing)} images of {data.class_prompt!r} into {folder}")
            model = load_pretrained(config.model).to(accelerator.device)
            for start in range(0, len(missing), AT_ONCE):
                heed()
                seeds = missing[start : start + AT_ONCE]
                with heeding(model.unet):
                    drawn = preview(model, [str(data.class_prompt)], seeds)
                for seed, image in zip(seeds, drawn, strict=True):
                    save_png(folder / f"class-{seed:05d}.png", image)

    by_main(accelerator, fill)
