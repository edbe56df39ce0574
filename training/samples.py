"""What the samples of a run have wrong, and what of them is good to know, for the report of `diffusion-unet check`."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffusion_unet.conditioning import PromptEncoder
from diffusion_unet.errors import InputError
from diffusion_unet.prompts import ClassLabels
from diffusion_unet.untrusted import shorten

from . import data, start
from .config import Config, DataConfig, TextualInversionConfig
from .decoding import THREADS
from .report import Fault, Report, kind_of, some


def tell_bad(report: Report, dataset: data.Dataset, config: DataConfig, told: data.Told) -> None:
    """Every fault of every sample that cannot be used: a look at one ends with its first."""
    source, count = dataset.source, len(dataset) + len(dataset.bad)
    bad = sorted({*range(count)}.difference(dataset.kept))

    def faults_of(index: int) -> list[str]:
        reasons = []
        width = height = config.min_size
        try:
            data.texts(source, told, index)
        except InputError as error:
            reasons.append(str(error))
        try:
            width, height = source.size(index)
            source.image(index)
            if config.original_image_column is not None:
                source.original(index)
        except InputError as error:
            reasons.append(str(error))
        if min(width, height) < config.min_size:
            reasons.append(f"{width}x{height} pixels, and data.min_size is {config.min_size}")
        return list(dict.fromkeys(reasons))  # a fault of the whole row is both the caption's and the image's

    for sample, reasons in zip(dataset.bad, _parallel(faults_of, bad), strict=True):
        for reason in reasons or [sample.reason]:
            report.faults.append(Fault(kind_of(reason, sample.name), sample.name, reason, stops=False))
    report.figures["images"] = {"found": count, "usable": len(dataset), "cannot_be_used": len(bad)}
    if refusal := data.too_many_bad(dataset, config):
        report.refuse("data", refusal)


def tell_duplicates(report: Report, dataset: data.Dataset, known: dict[str, data.Look], config: Config) -> None:
    """Samples of the same pixels at the size of training, with the same captions or others. known: all looks."""
    groups = _same_pixels(dataset, known)
    named = [[_name(dataset, sample) for sample in group] for group in groups]
    others = sum(len({tuple(dataset.captions[sample]) for sample in group}) > 1 for group in groups)
    extra = sum(len(group) - 1 for group in groups)
    report.figures["duplicates"] = {"superfluous": extra, "with_other_captions": others, "groups": named}
    if not groups:
        return
    text = f"{len(groups)} images are there more than once, {extra} superfluous, {others} with other captions"
    if 0 < config.data.held_out < dataset.instances:
        held_out = set(dataset.split(config.train.seed, config.data.held_out)[1])
        leaks = sum(bool(held_out.intersection(group)) and not held_out.issuperset(group) for group in groups)
        text += f", {leaks} both trained on and held out"
    report.notes.append(f"{text}: {some([' = '.join(names) for names in named])}")


def _same_pixels(dataset: data.Dataset, known: dict[str, data.Look]) -> list[list[int]]:
    """Groups of samples. Those whose sizes and moments agree are decoded; the others cannot be equal."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for sample, index in enumerate(dataset.kept):
        look = known.get(f"{dataset.source.name(index)} {dataset.source.stamp(index)}")
        if look is not None:
            alike[look.size, look.values].append(sample)
    equal: dict[Any, list[int]] = defaultdict(list)
    doubtful = [sample for samples in alike.values() if len(samples) > 1 for sample in samples]
    digests = _parallel(lambda sample: hashlib.sha256(dataset.image(sample).tobytes()).digest(), doubtful)
    for sample, digest in zip(doubtful, digests, strict=True):
        equal[dataset.sizes[sample], digest].append(sample)
    return sorted(sorted(group) for group in equal.values() if len(group) > 1)


def tell_enlarged(report: Report, dataset: data.Dataset) -> None:
    """Images that are smaller than what is trained on."""
    small = []
    for sample, (width, height) in enumerate(dataset.sizes):
        rows, columns = dataset.cover(sample)
        if rows > height or columns > width:
            small.append(sample)
    share = len(small) / max(1, len(dataset))
    report.figures["enlarged"] = {"images": len(small), "share": share}
    if small:
        names = some([_name(dataset, sample) for sample in small])
        report.notes.append(
            f"{len(small)} of {len(dataset)} images ({share:.1%}) are smaller than what is trained on, and are"
            f" enlarged: {names}"
        )


def tell_captions(
    report: Report, dataset: data.Dataset, text: PromptEncoder, inversion: TextualInversionConfig | None
) -> None:
    """Captions that are longer than the text encoder reads, are no class of it, or lack the word that is learned."""
    samples: dict[str, list[int]] = defaultdict(list)
    for sample, captions in enumerate(dataset.captions):
        for caption in captions:
            samples[caption].append(sample)
    if isinstance(text, ClassLabels):
        _tell_classes(report, {name: (len(own), _name(dataset, own[0])) for name, own in samples.items()}, text)
        return
    lengths, limit = _lengths(text, list(samples)), text.max_length
    long = sorted((caption for caption in samples if lengths[caption] > limit), key=lambda one: -lengths[one])
    share = len(long) / len(samples)
    places = [{"name": _name(dataset, samples[caption][0]), "tokens": lengths[caption]} for caption in long]
    report.figures["captions"] = {
        "different": len(samples),
        "limit": limit,
        "longest": max(lengths.values()),
        "too_long": len(long),
        "share": share,
        "long": places,
    }
    if long:
        report.notes.append(
            f"{len(long)} of {len(samples)} different captions ({share:.1%}) are longer than the {limit} tokens that"
            f" the text encoder reads, and are cut; the longest has {places[0]['tokens']}: {places[0]['name']}:"
            f" {shorten(long[0])}"
        )
    if inversion is not None:
        try:
            start.check_word(text, dataset, inversion.placeholder_token)
        except InputError as error:
            report.refuse("word", str(error))


def _tell_classes(report: Report, classes: dict[str, tuple[int, str]], labels: ClassLabels) -> None:
    """classes: images of each, and the name of the first."""
    report.figures["classes"] = {name: count for name, (count, _) in classes.items()}
    for name, (count, first) in classes.items():
        try:
            labels.tokenize([name])
        except InputError as error:
            report.refuse("class", f"{error} ({count} images, the first {first})")


def _lengths(text: PromptEncoder, captions: Sequence[str]) -> dict[str, int]:
    """Tokens of each caption, by the text encoder that makes the most of it."""
    found = dict.fromkeys(captions, 0)
    for encoder in text.encoders.values():
        for first in range(0, len(captions), start.AT_ONCE):
            part = captions[first : first + start.AT_ONCE]
            texts = [caption.encode("utf-8", "replace").decode() for caption in part]
            rows = encoder.tokenizer(texts, verbose=False)["input_ids"]
            found |= {caption: max(found[caption], len(row)) for caption, row in zip(part, rows, strict=True)}
    return found


def _name(dataset: data.Dataset, sample: int) -> str:
    return dataset.source.name(dataset.kept[sample])


def _parallel(work: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))
