"""Batches of a stream that is not indexed: data.streaming pure.

A stream has neither a length nor a way back to a row, so nothing says what a run has seen of it. Where the run goes on,
the stream begins anew, in another order: of all sources, this one alone does not resume exactly. What is drawn for an
image of the run, its noise and level, crop, mirror image and caption, has its address here too.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_unet.errors import InputError, SaveError, Stopped
from diffusion_unet.model import DiffusionModel
from diffusion_unet.untrusted import shorten

from .batches import Batch, Batches
from .config import Config, DataConfig
from .data import LISTED, Bad, Dataset, inspect
from .network import told_by
from .plan import step_indices
from .sources import Samples
from .start import BAD
from .tables import IMAGE, WINDOW, Table, open_stream, stream_rows, table_of

ALL = 2**20  # megabytes: every image of a batch stays decoded from the look at it until it is cut
JUDGED = WINDOW  # rows that a process has taken before the share of bad ones may end the run

Row = tuple[str, Mapping[str, Any]]  # its name and its values


def limitation(config: DataConfig) -> str:
    """What a person is told of training on a stream itself."""
    return (
        f"data.streaming: pure: {config.dataset_name} is trained on as it comes, and only its first rows, at most"
        f" {WINDOW}, were looked at; a run that goes on takes the rows in another order, so that some come again and"
        " some do not; weights, averages, optimizer, rate and noise go on exactly"
    )


class StreamBatches(Batches):
    """Batches of process `rank` of `world`, whose rows no other process takes; `ahead` opens the stream.

    dataset: the look at the first rows, which are then let go. say: is told of rows that are passed over."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: DiffusionModel,
        rank: int = 0,
        world: int = 1,
        *,
        say: Callable[[str], None] = print,
    ):
        super().__init__(config, dataset, model, rank, world)
        assert isinstance(dataset.source, Samples) and isinstance(dataset.source.reader, Table)
        empty = dataclasses.replace(dataset.source.reader, pictures={}, texts=None)
        dataset.source = self.source = dataclasses.replace(dataset.source, reader=empty)
        dataset.cached.clear()
        self.say, self.told = say, told_by(config.model, model)
        self.taken, self.bad = 0, 0  # rows
        self._names: dict[int, str] = {}  # of the images of the last two batches
        say(limitation(config.data))

    def ahead(self, first: int, last: int) -> Iterator[Batch]:
        """As of Batches; the stream begins anew, in an order that follows from `first`.

        Raises Stopped where it breaks off, InputError where it cannot be opened or too many rows are bad, SaveError."""
        self._rows = self._endless(first)
        yield from super().ahead(first, last)

    def assemble(self, step: int) -> Batch:
        """Each step once, in their order."""
        size = self.config.train.train_batch_size
        indices = step_indices(step, size, self.rank, self.world)
        self.dataset, names = self._take(len(indices))
        recent = {index: name for index, name in self._names.items() if index >= (step - 1) * size}
        self._names = {**recent, **dict(zip(indices, names, strict=True))}
        draws, chosen = self.plan.draw(indices), range(len(indices))  # the rows stand in for draws.samples
        return self._batch(indices, chosen, draws, self._captions(chosen, draws))

    def names(self, indices: range) -> list[str]:
        """What these images of the run were, those of the last two batches."""
        return [self._names[index] for index in indices]

    def _take(self, count: int) -> tuple[Dataset, list[str]]:
        """The next `count` rows that can be used, looked at, and their names."""
        import datasets

        settings = dataclasses.replace(self.config.data, max_train_samples=None, cache_in_memory=ALL)
        rows: list[Row] = []
        while True:
            fresh = [next(self._rows) for _ in range(count - len(rows))]
            rows, self.taken = rows + fresh, self.taken + len(fresh)
            names, values = zip(*rows, strict=True)
            table = table_of(settings, datasets.Dataset.from_list(list(values), features=self._features), names)
            source = dataclasses.replace(self.source, reader=table)
            seen = inspect(source, settings, self.dataset.channels, told=self.told)
            if not seen.bad:
                return seen, list(names)
            self._pass_over(seen.bad)
            rows = [rows[place] for place in seen.kept]

    def _endless(self, first: int) -> Iterator[Row]:
        """This process's rows, epoch after epoch, each in an order of its own."""
        from datasets.distributed import split_dataset_by_node

        data, order = self.config.data, np.random.default_rng((self.config.train.seed, first))
        stream = open_stream(data)
        self._features = stream.features
        stream = stream.shuffle(generator=order, buffer_size=data.shuffle_buffer)
        stream = split_dataset_by_node(stream, self.rank, self.world)
        for epoch in itertools.count():
            stream.set_epoch(epoch)
            number = 0
            try:
                for number, row in enumerate(stream_rows(data, stream, "the same command goes on"), 1):
                    yield f"epoch {epoch + 1}, row {number} as they came{self._mark(row)}", row
            except InputError as error:
                raise Stopped(str(error)) from error
            if number == 0:
                raise InputError(
                    f"data.dataset_name: {data.dataset_name} has no row for process {self.rank + 1} of {self.world}"
                )

    def _mark(self, row: Mapping[str, Any]) -> str:
        """What a row may be found by, as its number depends on the order."""
        data = self.config.data
        picture, caption = row[data.image_column or IMAGE], row.get(data.caption_column)
        mark = (picture and picture["path"]) or caption
        return f" ({shorten(mark)})" if isinstance(mark, str) else ""

    def _pass_over(self, bad: Sequence[Bad]) -> None:
        """Names what cannot be used. Raises InputError where it is too much, SaveError."""
        data, path = self.config.data, Path(self.config.train.output_dir) / BAD
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(one._asdict()) + "\n" for one in bad)
        except OSError as error:
            raise SaveError(f"{path}: cannot be written ({error.strerror}); make room, and go on") from error
        for place, one in enumerate(bad, self.bad):
            if place < LISTED:
                self.say(f"passed over: {_line(one)}")
            elif place == LISTED:
                self.say(f"passed over: more than {LISTED} rows; all of them are in {path}")
        self.bad += len(bad)
        if self.taken >= JUDGED and self.bad > data.max_bad_fraction * self.taken:
            raise InputError(
                f"data.dataset_name: {self.bad} of {self.taken} rows of {data.dataset_name} cannot be used, more than"
                f" data.max_bad_fraction ({data.max_bad_fraction:g}) allows; the last: {_line(bad[-1])}"
            )


def _line(bad: Bad) -> str:
    return bad.reason if bad.name in bad.reason else f"{bad.name}: {bad.reason}"
