"""What would go wrong in a run, and what it will take, found on the CPU before it begins: `diffusion-unet check`.

What it asks of the settings, the data and the model it asks through the functions that `train` begins with. It writes
nothing but the index of the images that it has looked at, so that `train` decodes none of them to look at it again
(and, for a streamed data set, the shards that are to be trained on).
"""

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_unet.codec import LatentCodec, PixelCodec
from diffusion_unet.conditioning import TextEncoder
from diffusion_unet.errors import InputError, SaveError, in_bytes
from diffusion_unet.model import DiffusionModel
from diffusion_unet.model_index import index_of
from diffusion_unet.unet import UNet

from . import buckets, checkpoint, data, network, resume, start
from .batches import Batches
from .cache import Store
from .config import Config, DataConfig
from .engine import locked
from .footprint import Footprint, footprint
from .metrics import tracker_settings
from .optimizer import rate_course
from .precompute import keep_latents, keep_texts
from .prior import fill_class_images
from .report import Report, some
from .samples import tell_bad, tell_captions, tell_duplicates, tell_enlarged
from .stream import limitation
from .tables import STREAMED

NOBODY = sys.maxsize  # rank of a process to which no work falls
FLOAT = 4  # bytes


def check(config: Config, *, progress: bool = True, allow_change: Sequence[str] = ()) -> Report:
    """All faults of a run's settings, data and model at once, and its figures. Trains nothing and needs no GPU.

    Where there are samples that cannot be used, `would_fail` says whether there are more than the settings bear. Raises
    none of the errors that a run would end with: they are faults of the report. allow_change: as of `train`."""
    preflight = _Preflight(config, progress, allow_change)
    preflight.run()
    return preflight.report


class _Nobody:
    """In the place of an accelerator: a process that computes and writes nothing, as no share of the work is its."""

    process_index, num_processes, is_main_process = NOBODY, NOBODY + 1, True
    device = torch.device("cpu")

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


@dataclass(frozen=True)
class _Noting:
    report: Report
    kind: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, InputError | SaveError):
            self.report.refuse(self.kind, str(error))
            return True
        return False


class _Preflight:
    def __init__(self, config: Config, progress: bool, allowed: Sequence[str]):
        self.config, self.progress, self.allowed = config, progress, allowed
        self.report = Report(config.train.output_dir)
        self.run_folder = Path(config.train.output_dir)
        self.cache = Path(str(start.with_cache(config).cache_dir))

    def run(self) -> None:
        found = self._look_at_run()
        if found and found.state["step"] == self.config.train.max_train_steps and not found.state["look_due"]:
            self.report.notes.append(f"{found.path}: the run is finished; there is nothing more to train")
            return
        pretrained, channels = None, 3
        with self._noting("model"):
            if self.config.model.pretrained:
                pretrained = network.load_pretrained(self.config.model)
                channels = pretrained.codec.channels
            else:
                channels = network.new_channels(self.config.model, self.config.data.resolution)
        self._compare_model(found, pretrained)
        dataset = self._look_at_data(channels, network.told_by(self.config.model, pretrained), found)
        model = None
        with self._noting("model"):
            if pretrained is not None:
                model = network.fit_to_task(pretrained, self.config)
            elif found is not None:
                model = start.untrained(self.config)
            elif not self.config.model.pretrained:
                model = self._sketch(dataset)
        if model is not None:
            self._look_at_prompts(model)
            if dataset is not None and dataset.instances:
                if model.text is not None:
                    with self._noting("caption"):
                        tell_captions(self.report, dataset, model.text, self.config.model.textual_inversion)
                self._look_at_batches(dataset, model, found)

    def _noting(self, kind: str) -> "_Noting":
        """What a run would end with is a fault within it, and the next thing is looked at."""
        return _Noting(self.report, kind)

    # ---- the run folder and the settings ----

    def _look_at_run(self) -> checkpoint.Checkpoint | None:
        """The checkpoint that a run would go on from."""
        config, notes, found = self.config, self.report.notes, None
        with self._noting("settings"):
            tracker_settings(config.train.report_to, self.run_folder)
        with self._noting("settings"):
            rate_course(config)
        if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
            notes.append("train.mixed_precision: fp16 needs a GPU, which this machine does not have")
        with self._noting("run folder"):
            if (self.run_folder / ".lock").exists():
                with locked(self.run_folder):
                    pass
        with self._noting("run folder"):
            found = checkpoint.load(self.run_folder, notes.append)
        if found is None:
            return None
        with self._noting("run folder"):
            resume.check_allowed(self.allowed)
            notes += resume.tell(resume.changes_of(found, config, self.allowed))
        if found.state["step"] < config.train.max_train_steps:
            notes.append(f"{found.path}: the run goes on from step {found.state['step']}")
        return found

    def _compare_model(self, found: checkpoint.Checkpoint | None, pretrained: DiffusionModel | None) -> None:
        if found is not None and (pretrained is not None or not self.config.model.pretrained):
            with self._noting("run folder"):
                before = pretrained or start.model_before(self.config)
                resume.refuse_other_model(found, self.config, before.fingerprint())

    # ---- the samples ----

    def _look_at_data(self, channels: int, told: data.Told, found: checkpoint.Checkpoint | None) -> data.Dataset | None:
        """All samples, decoded unless they were before; None where there is nothing to look at."""
        config = dataclasses.replace(self._settings_of_data(), cache_in_memory=0)
        full, index = dataclasses.replace(config, look="full"), self.cache / start.INDEX
        if config.streaming == "pure":
            self.report.notes.append(limitation(config))
        with self._noting("data"):
            source = data.open_data(full, channels)
            watch = start.shown("looking at images", self.progress)
            dataset = data.inspect(source, full, channels, told=told, index=index, watch=watch)
            tell_bad(self.report, dataset, full, told)
            if line := start.unlisted(dataset):
                self.report.notes.append(line)
            looks = data.read_index(index, full, channels, told)
            tell_duplicates(self.report, dataset, looks, self.config)
            tell_enlarged(self.report, dataset)
            fingerprint = dataset.fingerprint
            if config.streaming == "pure":
                fingerprint = STREAMED
                self.report.figures["stream"] = {"looked_at": len(source), "exact_resume": False}
            if config.look == "quick":
                dataset.mean = dataset.std = float("nan")
                quick = data.inspect(source, config, channels, told=told)
                fingerprint = quick.fingerprint
                if len(quick.bad) < len(dataset.bad):
                    self.report.refuse(
                        "data",
                        f"data.look: quick passes {len(dataset.bad) - len(quick.bad)} images that cannot be decoded,"
                        " and the run would end at the first of them: take full, or take them out",
                    )
            if found:
                with self._noting("run folder"):
                    changes = resume.changes_of_data(found, self.config.data, fingerprint, self.allowed)
                    self.report.notes.extend(resume.tell(changes))
            return dataset
        return None

    def _settings_of_data(self) -> DataConfig:
        """Without the images of the class, where they are yet to be drawn."""
        settings = start.with_cache(self.config)
        try:
            fill_class_images(self.config, _Nobody(), None, self.report.notes.append)
        except InputError as error:
            if self.config.model.pretrained is None:
                self.report.refuse("data", str(error))
            else:
                self.report.notes.append(f"{error}; otherwise the run begins by drawing them")
            return dataclasses.replace(settings, class_data_dir=None, class_prompt=None)
        return settings

    # ---- the model ----

    def _sketch(self, dataset: data.Dataset | None) -> DiffusionModel | None:
        """The model of a new run, its U-Net without values; None where a part cannot be made."""
        config, text, whole = self.config.model, None, False
        codec: PixelCodec | LatentCodec | None = None
        usable = dataset if dataset is not None and dataset.instances else None
        with self._noting("model"):
            if config.vae is not None:
                codec = LatentCodec.load(Path(config.vae), dtype=torch.float32)
            elif usable is not None:
                codec = network.pixel_codec(config, usable)
        side = self.config.data.resolution // (codec.scale_factor if codec else 1)
        unet_config = network.unet_config(config, sample_size=side)
        with self._noting("model"):
            if usable is not None:
                text = network.new_text(config, unet_config, usable, self.config.train.seed)
                whole = codec is not None
            elif config.pretrained_text_encoder is not None:
                TextEncoder.load(config.pretrained_text_encoder, dtype=torch.float32)
        with torch.device("meta"):
            unet = UNet(unet_config)
        if not whole or codec is None:
            return None
        try:
            model = DiffusionModel(unet, network.new_schedule(config.schedule), text, codec)
        except InputError as error:
            raise InputError(f"model: {error}") from None
        index_of(model)  # refuses what could not be saved
        return network.fit_to_task(model, self.config)

    def _look_at_prompts(self, model: DiffusionModel) -> None:
        """Each by itself."""
        for prompt in self.config.validation.validation_prompts:
            validation = dataclasses.replace(self.config.validation, validation_prompts=(prompt,))
            with self._noting("prompt"):
                start.check_prompts(dataclasses.replace(self.config, validation=validation), model)

    # ---- the batches, and what they take ----

    def _look_at_batches(
        self, dataset: data.Dataset, model: DiffusionModel, found: checkpoint.Checkpoint | None
    ) -> None:
        config, batches, taken = self.config, None, None
        with self._noting("data"):
            batches = Batches(config, dataset, model)
            if config.data.streaming != "pure":  # of which nobody knows how much there is
                self._tell_buckets(batches)
        if batches is None:
            return
        with self._noting("settings"):
            taken = footprint(config, model, batches.training_batches(1)[0])
            self.report.add_memory(taken)
        for keep in (keep_latents, keep_texts):
            with self._noting("cache"):
                keep(batches, _Nobody(), lambda items, count: items)
        self._tell_disk(batches, taken, found)

    def _tell_buckets(self, batches: Batches) -> None:
        batches.plan.course  # noqa: B018 - raises where there is nothing to train on
        size = self.config.train.train_batch_size
        of_class = bool(batches.plan.classes)
        counts = [len(members) for members in batches.plan.members]
        filled = buckets.fill(counts, max(1, size // 2) if of_class else size)
        shapes = batches.dataset.buckets
        rows = [
            {"size": [width, height], "images": count, "batches": share}
            for (height, width), count, share in zip(shapes, counts, filled.batches, strict=True)
        ]
        self.report.figures["buckets"] = rows
        self.report.figures["images"] |= {"held_out": len(batches.held_out), "trained_on": sum(counts)}
        if filled.small:
            small = [f"{shapes[b][1]}x{shapes[b][0]} ({counts[b]})" for b in filled.small]
            self.report.notes.append(
                f"{len(small)} buckets hold fewer images than a step takes ({size}), which then holds some more than"
                f" once: {some(small)}"
            )

    def _tell_disk(self, batches: Batches, taken: Footprint | None, found: checkpoint.Checkpoint | None) -> None:
        """What is still to be written, and whether there is room."""
        config, train = self.config, self.config.train
        needed = {
            "latents": (self.cache, _latents_to_come(batches)),
            "captions": (self.cache, _texts_to_come(batches)),
        }
        if taken is not None:
            limit, saves = train.checkpoints_total_limit, -(-train.max_train_steps // train.checkpointing_steps)
            at_once = saves if limit is None else min(saves, limit + 1)
            there = sum(_size(path) for path in checkpoint.whole_looking(self.run_folder)[:at_once])
            needed["checkpoints"] = self.run_folder, max(0, at_once * taken.checkpoint - there)
            needed["model"] = self.run_folder, 0 if found or config.model.pretrained else taken.base
        disks: dict[int, tuple[Path, int]] = {}
        for folder, count in needed.values():
            place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
            first, total = disks.get(place.stat().st_dev, (place, 0))
            disks[place.stat().st_dev] = first, total + count
        free = {str(place): shutil.disk_usage(place).free for place, _ in disks.values()}
        self.report.figures["disk"] = {"needed": {name: count for name, (_, count) in needed.items()}, "free": free}
        for place, total in disks.values():
            if total > free[str(place)]:
                sizes = f"{in_bytes(total)} are needed and {in_bytes(free[str(place)])} are free"
                self.report.refuse("disk", f"{place}: {sizes}: make room")


def _missing(store: Store) -> Iterator[int]:
    """Entries that are still to be computed."""
    for number in range(store.shards):
        if not store.whole(number):
            yield from store.entries(number)


def _latents_to_come(batches: Batches) -> int:
    """Bytes."""
    codec, sizes = batches.model.codec, batches.dataset.buckets
    if batches.latents is None or isinstance(codec, PixelCodec):
        return 0
    pixels = Counter(sizes[batches.bucket_of(entry)] for entry in _missing(batches.latents))
    area = sum(height * width * count for (height, width), count in pixels.items()) // codec.scale_factor**2
    return 2 * codec.latent_channels * area * FLOAT


def _texts_to_come(batches: Batches) -> int:
    """Bytes."""
    text = batches.model.text
    if batches.texts is None or text is None:
        return 0
    each = text.max_length * (text.width or 0) + (text.pooled_width or 0)
    return sum(1 for _ in _missing(batches.texts[0])) * each * FLOAT


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
