"""A picture drawn again from its own record, and how far the two are apart."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.model_index import INDEX
from diffusion_unet.untrusted import shorten

from .adapters import from_record, with_adapters
from .record import environment, read_picture, sha256
from .sampler import sample

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a record, what `sample` takes under the same name.
_PASSED = (
    "solver", "eta", "tile", "guidance_scale", "guidance_rescale", "negative_prompt", "rng", "exact", "variation_seed",
    "variation_strength", "strength",
)  # fmt: skip

Draw = Callable[..., "list[Image]"]  # as `sample`


@dataclass(frozen=True, eq=False)
class Replayed:
    """A picture drawn again. Distances are between the bytes of the two pictures, from 0 to 255.

    image        the picture as it was drawn here, with its own record
    model        the folder of the model
    largest      distance
    mean         distance
    share        of the bytes that differ
    differences  what is not as it was when the first was drawn, a line for each
    """

    image: "Image"
    model: Path
    largest: int
    mean: float
    share: float
    differences: tuple[str, ...]

    @property
    def same(self) -> bool:
        """To 1/255, which is what a picture drawn in a batch keeps to."""
        return self.largest <= 1

    def __str__(self) -> str:
        """One line."""
        if not self.largest:
            return f"bit-identical, drawn with {self.model}"
        far = f"{'within 1/255' if self.same else 'another picture'}: {self.share:.2%} of the bytes differ, by at most"
        why = "; ".join(self.differences) or "nothing that is recorded differs"
        return f"{far} {self.largest} and {self.mean:.3g} on average of 255; {why}"


def replay(
    picture: Path,
    *,
    model: Path | None = None,
    folders: Sequence[Path] = (),
    files: Sequence[Path] = (),
    device: str | None = None,
    draw: Draw = sample,
    progress: Callable[[int, int], None] | None = None,
) -> Replayed:
    """Draws a picture again as its record says, and compares the two.

    Args:
        picture: a PNG with its record, its pixels as they were drawn.
        model: folder of its model. None looks for it by its hash: at the path in the record, among the runs of the
            working folder, near the picture, and in `folders`.
        files: pictures, masks and adapters that it was drawn with and that are not at their recorded paths any more;
            which is which is known by their sha256.
        device: None is the record's, or the CPU where that is not to be had here.
        draw: called as `sample`.

    While it draws, torch's number of threads is the record's, for the whole process.

    Raises InputError, one line: no picture with a record, a model or a file that is not found or is another one.
    """
    before, record = read_picture(picture)
    width, height = before.size
    if tuple(record.get("size", (height, width))) != (height, width) or before.mode not in ("L", "RGB"):
        raise InputError(f"{picture}: its pixels were changed since it was drawn, and cannot be compared")
    inputs, adapters = _inputs(picture, record, files)
    folder, found = find_model(picture, record, model, folders)
    found.to(_device(device, record.get("device", "cpu")))
    drawn_from = with_adapters(found, **from_record(adapters), size=(height, width))
    with _threads(record.get("threads", torch.get_num_threads())):
        request = request_of(record) | {"progress": progress} | inputs
        prompts = [record["prompt"]] if "prompt" in record else None
        after = draw(drawn_from, prompts, seeds=[record["seed"]], **request)[0]
        differences = _differences(record, environment(found))
    if after.mode != before.mode or after.size != before.size:
        raise InputError(f"{picture}: its pixels were changed since it was drawn, and cannot be compared")
    apart = np.abs(np.asarray(after).astype(np.int16) - np.asarray(before))
    return Replayed(after, folder, int(apart.max()), float(apart.mean()), float((apart > 0).mean()), differences)


def request_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `sample` that a record states, without prompt, seed and files.

    The noise levels are the recorded ones, so that the way they are made may change; a record without them states how
    they were made.
    """
    request = {name: record[name] for name in _PASSED if name in record}
    if "size" in record:
        request["size"] = tuple(record["size"])
    if "interval" in record:
        low, *high = record["interval"]
        request["interval"] = (low, high[0] if high else None)
    if "sigmas" in record:
        return request | {"sigmas": record["sigmas"]}
    return request | {name: record[name] for name in ("steps", "spacing") if name in record}


# --- what the record names


def find_model(
    picture: Path, record: Mapping[str, Any], given: Path | None = None, folders: Sequence[Path] = ()
) -> tuple[Path, DiffusionModel]:
    """The folder and the model of the record's hash, on the CPU; arguments and errors as of `replay`."""
    wanted = record["model_hash"]
    if given is not None:
        model, found = _load(given, record)
        if model is None:
            raise InputError(
                f"{picture}: a record from another model: its own has the hash {wanted[:10]}, {given} has {found[:10]}"
            )
        return given, model
    looked = 0
    for folder in _candidates(picture, record.get("model"), folders):
        try:
            model, _ = _load(folder, record)
        except InputError:  # a model that cannot be loaded is not the one that it was drawn with
            model = None
        if model is not None:
            return folder, model
        looked += 1
    name = shorten(record["model"], 200) if "model" in record else "unknown"
    raise InputError(
        f"{picture}: its model ({name}, hash {wanted[:10]}) is none of the {looked} found here: give it, --model DIR"
    )


def _load(folder: Path, record: Mapping[str, Any]) -> tuple[DiffusionModel | None, str]:
    """The model if it is the record's, and its hash; in the numbers of its files, or else those of the record."""
    model = DiffusionModel.load(folder)
    found = model.fingerprint()
    dtype = getattr(torch, record.get("dtype", "float32"))
    if found != record["model_hash"] and next(model.unet.parameters()).dtype != dtype:
        cast = DiffusionModel.load(folder, dtype=dtype)
        if cast.fingerprint() == record["model_hash"]:
            return cast, record["model_hash"]
    return (model if found == record["model_hash"] else None), found


def _candidates(picture: Path, recorded: str | None, folders: Sequence[Path]) -> Iterator[Path]:
    """Models to look at, the likeliest first, each once."""
    near = picture.resolve().parents[:3]
    places = [Path(recorded)] if recorded else []
    places += sorted(Path("runs").glob("*/model"))
    for folder in (*folders, *near):
        places += [folder, *sorted(path.parent for path in folder.glob(f"*/{INDEX}"))]
    seen = set()
    for place in places:
        with contextlib.suppress(OSError):  # a path that no file can have here
            single = place.suffix == ".safetensors" and place.is_file()
            if (single or (place / INDEX).is_file()) and place.resolve() not in seen:
                seen.add(place.resolve())
                yield place


def _inputs(
    picture: Path, record: Mapping[str, Any], files: Sequence[Path]
) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Image and mask, and the entries of the adapters, all by their paths on this machine. Raises InputError."""
    given = {sha256(path): path for path in files}
    used = set()

    def find(entry: Mapping[str, Any], what: str) -> Path:
        wanted, recorded = entry["sha256"], entry.get("path")
        used.add(wanted)
        if wanted in given:
            return given[wanted]
        with contextlib.suppress(InputError, OSError):  # it is asked for below
            if recorded is not None and sha256(Path(recorded)) == wanted:
                return Path(recorded)
        where = "was no file" if recorded is None else f"is not at {shorten(recorded, 200)}, or was changed since"
        raise InputError(f"{picture}: the {what} that it was drawn with {where}: give it, --file FILE")

    found = {name: find(record[name], name) for name in ("image", "mask") if name in record}
    adapters = []
    for adapter in record.get("adapters", ()):
        kind = shorten(adapter["kind"])[1:-1]
        parts = {part: find(adapter[part], f"{part} of its {kind}") for part in ("image", "encoder") if part in adapter}
        adapters.append({**adapter, "path": find(adapter, kind), **parts})
    for digest in given.keys() - used:
        raise InputError(f"{given[digest]}: is none of the files that {picture} was drawn with")
    return found, adapters


# --- the surroundings


def _device(given: str | None, recorded: str) -> str:
    name = given or recorded
    try:
        there = not torch.empty(1, device=name).is_meta
    except (RuntimeError, AssertionError, ImportError):  # which it is depends on how torch was built
        there = False
    if not there and given is not None:
        raise InputError(f"device {given} is not to be had here: leave it out, or take cpu")
    return name if there else "cpu"


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _differences(record: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    then, now = record.get("versions", {}), here["versions"]
    pairs = [(name, record.get(name), here[name]) for name in ("dtype", "device", "threads")]
    pairs += [(name, then.get(name), now.get(name)) for name in sorted({*then, *now}) if then]
    lines = [f"{shorten(name)[1:-1]} {_said(old)} then, {_said(new)} here" for name, old, new in pairs if old != new]
    if record.get("batch_size", 1) > 1:
        lines.append(f"in a batch of {record['batch_size']} then, alone here")
    return tuple(lines)


def _said(value: object) -> str:
    return "none" if value is None else shorten(str(value))[1:-1]
