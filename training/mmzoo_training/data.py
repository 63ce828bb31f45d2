"""Training on records: samples packed into rows, rows into batches, in an order that can be resumed.

Shape legend: B rows, L tokens of the longest row, K layout fields, F frames of a medium, C, H, W channels and sides.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mmzoo
from mmzoo.errors import InputError, MissingExtra, MmzooError
from mmzoo.layout import Modality, Role, Span, TokenLayout, pack
from mmzoo.processing import IMAGE, VIDEO, MultimodalProcessor, Turn
from mmzoo_training.records import Medium, Problem, Record, open_image, open_video, read_records, require

logger = logging.getLogger(__name__)

Row = list[int]
"""Numbers of the samples that share one row."""


@dataclass
class Source:
    """Where samples come from.

    Attributes:
        path: a .json, .jsonl or .tar file, or a folder, as `mmzoo data check` takes it.
        format: llava, swift, chat or webdataset; told by what the records hold if left out.
        media: the folder that paths of media start from; the file's own by default.
        name: what its loss is logged under; the file's name by default.
        weight: its share of an epoch, relative to the other sources. All have one or none has.
    """

    path: Any
    format: str | None = None
    media: str | None = None
    name: str | None = None
    weight: float | None = None

    @property
    def label(self) -> str:
        return self.name or (Path(self.path).stem if isinstance(self.path, (str, Path)) else "dataset")


class Sample(NamedTuple):
    """One text with its media; `length` counts its tokens, media included."""

    text: str
    images: tuple[Medium, ...]
    videos: tuple[Medium, ...]
    source: str
    where: str
    length: int = 0


class Encoded(NamedTuple):
    """What the processor makes of a sample: ids, layout [1, L, K], pixels [F, C, H, W] of each medium."""

    ids: list[int]
    layout: TokenLayout
    pixels: list[Tensor]
    source: str


def turns_of(record: Record) -> tuple[str | None, list[Turn]]:
    """The system text, if there is one, and the turns. In each turn media move before the question."""
    said = list(record.messages)
    system = said.pop(0).text if said[0].role == "system" else None
    turns = []
    for asked, answer in zip(said[::2], said[1::2], strict=True):
        places = re.findall(f"{IMAGE}|{VIDEO}", asked.text)
        turns.append(Turn(re.sub(f"{IMAGE}|{VIDEO}", "", asked.text).strip(), answer.text, "".join(places)))
    return system, turns


def samples_of(record: Record, processor: MultimodalProcessor, template: str, source: str) -> list[Sample]:
    """What is trained on a record, without lengths.

    A dialogue is one sample. For a family that is trained on single turns each turn is one, with all media so far
    before its question. A caption is the media with the answer alone.

    Raises:
        InputError: a text holds a marker of the family's, a caption has several turns, or see
            `MultimodalProcessor.dialogue`.
    """
    system, turns = turns_of(record)
    if template == "caption":
        if len(turns) != 1 or not turns[0].media:
            raise InputError(f"a caption is one turn with media, this record has {len(turns)}")
        text = processor.caption(turns[0].answer, turns[0].media)
        return [Sample(text, record.images, record.videos, source, record.source)]
    _refuse_markers(turns, processor)
    if processor.multi_turn:
        return [Sample(processor.dialogue(turns, system), record.images, record.videos, source, record.source)]
    samples, media = [], ""
    for turn in turns:
        media += turn.media
        text = processor.dialogue([turn._replace(media=media)], system)
        images, videos = record.images[: media.count(IMAGE)], record.videos[: media.count(VIDEO)]
        samples.append(Sample(text, images, videos, source, record.source))
    return samples


def _refuse_markers(turns: Sequence[Turn], processor: MultimodalProcessor) -> None:
    for turn in turns:
        for marker in (processor.answer_marker.strip(), processor.turn_marker.strip()):
            if marker in turn.question or marker in turn.answer:
                raise InputError(f"a message holds {marker!r}, by which it is told who speaks")


class Lengths:
    """How many tokens a sample takes at most, known before its media are read: most families give each medium as many.

    Args:
        processor: the family's.
        template: "chat" or "caption".
        max_text_tokens: longer texts are cut, before media take their places.
    """

    def __init__(self, processor: MultimodalProcessor, template: str, max_text_tokens: int | None):
        self.processor, self.template, self.max_text_tokens = processor, template, max_text_tokens
        frame = processor.pixels([Image.new("RGB", (64, 64))])
        clip = frame.expand(processor.num_frames, *frame.shape[1:])
        self.spans: dict[str, list[Span]] = {
            IMAGE: processor.spans(frame, Modality.IMAGE),
            VIDEO: processor.spans(clip, Modality.VIDEO),
        }

    def __call__(self, text: str) -> int:
        """Raises InputError if the cut takes a medium or all of the answer away, or there are too many media."""
        standing = [self.spans[place] for place in re.findall(f"{IMAGE}|{VIDEO}", text)]
        ids = self.processor.encode(self.processor.expand(text, standing), max_length=self.max_text_tokens)
        _, layout = self.processor.lay_out(ids, [span for spans in standing for span in spans])
        answer = (layout.role == int(Role.ANSWER)) & (layout.modality == int(Modality.TEXT))
        # Without the marker of an answer, a layout takes all of a text for one.
        if not bool(answer.any()) or (self.template == "chat" and bool(answer[0, 0])):
            raise InputError(f"nothing of the answer is left of the first {self.max_text_tokens} tokens of the text")
        return len(layout)


def load_samples(
    source: Source, processor: MultimodalProcessor, template: str, max_tokens: int, max_text_tokens: int | None
) -> tuple[list[Sample], list[Problem]]:
    """The samples of a source, and what is wrong with those that cannot be used."""
    length, samples, problems = Lengths(processor, template, max_text_tokens), [], []
    for record in read_records(source.path, source.format, source.media):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        try:
            for sample in samples_of(record, processor, template, source.label):
                found = length(sample.text)
                if found > max_tokens:
                    raise InputError(f"{found} tokens, a row has {max_tokens} (max_tokens)")
                samples.append(sample._replace(length=found))
        except InputError as error:
            file, _, line = record.source.rpartition(":")
            problems.append(Problem(file, line, "", str(error)))
    return samples, problems


# Samples -> batches


@dataclass(frozen=True)
class Batching:
    """How samples are put into batches.

    Attributes:
        max_tokens: tokens of a row at most.
        batch_size: rows of a batch at most.
        batch_tokens: tokens of a batch at most, padding included; None for no limit.
        pack: several samples in a row; otherwise one.
        window: how many samples, in the order drawn, are looked at together: to fill rows, or to put samples of like
            length into one batch. 1 keeps the order.
    """

    max_tokens: int = 2048
    batch_size: int = 8
    batch_tokens: int | None = None
    pack: bool = True
    window: int = 512

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.batch_size, self.window) < 1 or (self.batch_tokens or self.max_tokens) < 1:
            raise InputError(f"max_tokens, batch_size, batch_tokens and window are at least 1: {self}.")
        if self.batch_tokens is not None and self.batch_tokens < self.max_tokens:
            raise InputError(f"batch_tokens={self.batch_tokens} is less than one row of max_tokens={self.max_tokens}.")

    def batches(self, lengths: Sequence[int], order: Sequence[int], rng: random.Random | None) -> list[list[Row]]:
        """The batches of an epoch.

        Args:
            lengths: tokens of every sample.
            order: numbers of samples, as drawn.
            rng: shuffles rows and batches; None keeps them as they come.
        """
        rows: list[Row] = []
        for start in range(0, len(order), self.window):
            some = sorted(order[start : start + self.window], key=lambda i: -lengths[i])
            rows += filled_rows(some, lengths, self.max_tokens) if self.pack else [[i] for i in some]
        if rng is not None and self.pack:
            rng.shuffle(rows)
        batches = self._cut(rows, lengths)
        if rng is not None:
            rng.shuffle(batches)
        return batches

    def _cut(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[Row]]:
        batches: list[list[Row]] = []
        longest = 0
        for row in rows:
            size = sum(lengths[i] for i in row)
            full = not batches or len(batches[-1]) == self.batch_size
            wider = max(longest, size)
            if full or (self.batch_tokens and wider * (len(batches[-1]) + 1) > self.batch_tokens):
                batches.append([])
                wider = size
            batches[-1].append(row)
            longest = wider
        return batches


def filled_rows(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[Row]:
    """Rows of at most `max_tokens` tokens: each sample goes into the first row that has room for it."""
    rows: list[Row] = []
    room: list[int] = []
    for i in order:
        at = next((row for row, left in enumerate(room) if left >= lengths[i]), None)
        if at is None:
            rows.append([])
            room.append(max_tokens)
            at = -1
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def epoch_order(
    groups: Sequence[Sequence[int]], weights: Sequence[float] | None, rng: random.Random | None
) -> list[int]:
    """The samples of an epoch.

    Without weights all of them, once. With weights as many as there are in all: of each group its share, no sample of
    it again before all others of it had their turn.
    """
    if rng is None or weights is None:
        order = [i for group in groups for i in group]
    else:
        order = []
        for group, count in zip(groups, shares(weights, sum(map(len, groups))), strict=True):
            for _ in range(math.ceil(count / len(group))):
                order += rng.sample(group, min(len(group), count))
                count -= len(group)
    if rng is not None:
        rng.shuffle(order)
    return order


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to the weights, in whole numbers."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(one) for one in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[i] += 1
    return counts


def to_count(batches: list[list[Row]], count: int) -> list[list[Row]]:
    """The same rows in `count` batches: the largest are halved, or the last are left out."""
    batches = list(batches[:count])
    while len(batches) < count:
        at = max(range(len(batches)), key=lambda i: len(batches[i]))
        if len(batches[at]) < 2:
            raise InputError(f"{sum(map(len, batches))} rows are too few for {count} batches, one for each process.")
        half = len(batches[at]) // 2
        batches[at : at + 1] = [batches[at][:half], batches[at][half:]]
    return batches


class Rows(Dataset):
    """Reads the samples of a row; what cannot be read is a `Problem` in its place."""

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: MultimodalProcessor,
        max_text_tokens: int | None = None,
        deadline: float | None = None,
        pad_to_multiple_of: int = 1,
    ):
        self.samples, self.processor, self.max_text_tokens = samples, processor, max_text_tokens
        self.pad_to_multiple_of = pad_to_multiple_of
        self.read_video = functools.partial(processor.read_video, deadline=deadline)

    def __getitem__(self, row: Row) -> list[Encoded | Problem]:
        return [self.encoded(self.samples[i]) for i in row]

    def encoded(self, sample: Sample) -> Encoded | Problem:
        try:
            images = [open_image(image) for image in sample.images]
            videos = [open_video(video, self.read_video) for video in sample.videos]
            found = self.processor.sample(sample.text, images, videos, max_length=self.max_text_tokens)
            # Fewer is no error: a film that is shorter than the most that its family looks at.
            if len(found[0]) > sample.length:
                raise InputError(f"{sample.length} tokens were planned for, with its media there are {len(found[0])}")
        except MissingExtra:
            raise
        except (MmzooError, OSError) as error:
            file, _, line = sample.where.rpartition(":")
            return Problem(file, line, "", str(error))
        return Encoded(*found, sample.source)

    def collate(self, rows: Sequence[list[Encoded | Problem]]) -> tuple[dict[str, Any] | None, list[Problem]]:
        """The batch of what could be read, None if nothing could, and the problems."""
        problems = [one for row in rows for one in row if isinstance(one, Problem)]
        kept = [[one for one in row if isinstance(one, Encoded)] for row in rows]
        return self.packed([row for row in kept if row]), problems

    def packed(self, rows: Sequence[Sequence[Encoded]]) -> dict[str, Any] | None:
        """What the model's `forward` takes, and the source of every sample, row by row."""
        if not rows:
            return None
        batch = self.processor.collate(
            [[token for one in row for token in one.ids] for row in rows],
            [pack([one.layout for one in row]) for row in rows],
            [[medium for one in row for medium in one.pixels] for row in rows],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            labels=True,
        )
        return {**batch, "source": [one.source for row in rows for one in row]}


class RecordLoader:
    """Batches of rows, in an order that is a function of seed and epoch alone.

    Every epoch has as many batches as the first, which Lightning and learning-rate schedules count on: where packing
    gives fewer, some are halved, and where it gives more, the last are left out. One pass gives so many batches; a pass
    after one that was left goes on where that stood. Lightning keeps `state_dict` in its checkpoints; the pass after
    `load_state_dict` gives the batches that remained of the epoch.

    Args:
        rows: the samples.
        groups: numbers of the samples of each source.
        batching: how they are put into batches.
        weights: share of each source.
        seed: of the order; None keeps the order and begins anew every time, as for validation.
        skip: leave unreadable media out and count them; otherwise the first is an error.
        num_workers: processes that read media.
        rank, world_size: of this process; all plan the same batches, and each takes every `world_size`th.
    """

    def __init__(
        self,
        rows: Rows,
        groups: Sequence[Sequence[int]],
        batching: Batching,
        weights: Sequence[float] | None = None,
        seed: int | None = 0,
        skip: bool = False,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows, self.groups, self.batching, self.weights, self.seed = rows, groups, batching, weights, seed
        self.skip, self.num_workers, self.rank, self.world_size = skip, num_workers, rank, world_size
        self.lengths = [sample.length for sample in rows.samples]
        self.epoch, self.batch, self.resumed = 0, 0, False
        self.skipped: list[Problem] = []
        self.count = max(len(self._batches(0)) // world_size, 1) * world_size

    def __len__(self) -> int:
        return self.count // self.world_size

    def _batches(self, epoch: int) -> list[list[Row]]:
        rng = None if self.seed is None else random.Random(f"{self.seed}:{epoch}")
        return self.batching.batches(self.lengths, epoch_order(self.groups, self.weights, rng), rng)

    def plan(self, epoch: int) -> list[list[Row]]:
        """The batches of an epoch, of all processes."""
        batches = self._batches(epoch)
        left_out = sum(len(row) for batch in batches[self.count :] for row in batch)
        if left_out:
            logger.info("epoch %d: %d samples are left out, so that epochs are of one length", epoch, left_out)
        return to_count(batches, self.count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.seed is None:
            self.batch, self.skipped = 0, []
        done = self.batch // self.world_size % len(self) if self.resumed else 0
        self.resumed, wanted = False, len(self) - done
        while wanted > 0:
            if self.batch >= self.count:
                self.epoch, self.batch, self.skipped = self.epoch + 1, 0, []
            remaining = self.plan(self.epoch)[self.batch :]
            mine = remaining[self.rank :: self.world_size][: len(remaining) // self.world_size][:wanted]
            wanted -= len(mine)
            yield from self._read(mine)

    def _read(self, batches: Sequence[list[Row]]) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.rows,
            batch_sampler=batches,
            collate_fn=self.rows.collate,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),  # so that nothing is drawn from the global one
        )
        for batch, problems in loader:
            self.batch += self.world_size
            self._note(problems)
            if self.batch >= self.count:  # not after the loop, which nobody ends who counts batches
                self._report()
            if batch is not None:
                yield batch

    def _note(self, problems: Sequence[Problem]) -> None:
        if not self.skip:
            require(problems, "the media of a batch")
        for problem in problems:
            logger.warning("left out: %s", problem)
        self.skipped += problems

    def _report(self) -> None:
        if self.skipped:
            of = "validation" if self.seed is None else f"epoch {self.epoch}"
            logger.warning("%s: %d samples could not be read and were left out", of, len(self.skipped))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of samples and batching: what the order depends on beside seed and epoch."""
        seen = hashlib.sha256(repr((astuple(self.batching), self.weights, self.seed)).encode())
        for sample in self.rows.samples:
            seen.update(repr((sample.text, sample.length, sample.source)).encode())
        return seen.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches of it that were given out by all processes, and what was skipped in it."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "skipped": [[str(part) for part in problem] for problem in self.skipped],
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises InputError if samples, batching or seed are others."""
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                "The checkpoint was written with other samples, batching or seed: which of them remain is not known. "
                "Restore the data and options of that run, or start a new run from the saved model."
            )
        self.epoch, self.batch, self.resumed = state["epoch"], state["batch"], True
        self.skipped = [Problem(*problem) for problem in state["skipped"]]


class RecordData(lightning.LightningDataModule):
    """One's own clips, images and conversations: see `mmzoo data check`.

    Args:
        sources: where training samples come from.
        val_sources: where validation samples come from.
        model_name: whose processor makes the batches, where there is no trainer.
        template: "chat": questions and answers as the family puts them; "caption": media, then the answer alone.
        max_tokens: tokens of a row at most; a longer sample is a bad one.
        max_text_tokens: longer texts are cut, before media take their places.
        batch_size: rows of a batch at most.
        batch_tokens: tokens of a batch at most, padding included.
        pack: several samples in a row, which the layout keeps apart.
        window: how many samples are looked at together to fill rows or to find some of like length.
        pad_to_multiple_of: pad rows to a length that this divides.
        on_bad_sample: what becomes of samples that fail the checks, do not fit, or whose media cannot be read: "error",
            or "skip": left out, counted and reported.
        seed: of the order of samples.
        num_workers: processes that read media.
        deadline: seconds after which a video that cannot be read is given up.
    """

    def __init__(
        self,
        sources: list[Source],
        val_sources: list[Source] | None = None,
        model_name: str = "aki-nano",
        template: Literal["chat", "caption"] = "chat",
        max_tokens: int = 2048,
        max_text_tokens: int | None = None,
        batch_size: int = 8,
        batch_tokens: int | None = None,
        pack: bool = True,
        window: int = 512,
        pad_to_multiple_of: int = 1,
        on_bad_sample: Literal["error", "skip"] = "error",
        seed: int = 0,
        num_workers: int = 0,
        deadline: float | None = 60.0,
    ):
        super().__init__()
        self.sources, self.val_sources, self.model_name = sources, val_sources or [], model_name
        self.template, self.max_text_tokens, self.pad_to_multiple_of = template, max_text_tokens, pad_to_multiple_of
        self.batching = Batching(max_tokens, batch_size, batch_tokens, pack, window)
        self.skip = on_bad_sample == "skip"
        self.seed, self.num_workers, self.deadline = seed, num_workers, deadline
        if any(source.weight is not None for source in sources):
            bad = [source.label for source in sources if source.weight is None or source.weight <= 0]
            if bad:
                raise InputError(f"Give every source a weight above 0, or none. Without: {', '.join(bad)}.")

    @property
    def processor(self) -> MultimodalProcessor:
        model = self.trainer.lightning_module.model if self.trainer is not None else mmzoo.create(self.model_name)
        if model.processor is None:
            raise InputError(f"{type(model).__name__} has no processor. Load it with its tokenizer, or set one.")
        return model.processor

    def loader(self, sources: Sequence[Source], seed: int | None) -> RecordLoader:
        """The batches of some sources. Raises DatasetError with all problems, if they are not to be skipped."""
        processor, samples, groups, problems = self.processor, [], [], []
        for source in sources:
            found, wrong = load_samples(
                source, processor, self.template, self.batching.max_tokens, self.max_text_tokens
            )
            groups.append(list(range(len(samples), len(samples) + len(found))))
            samples += found
            problems += wrong
            if not found:
                problems.append(Problem(source.label, 0, "", "no sample that can be used"))
        if not (self.skip and all(groups)):
            require(problems, "the training data" if seed is not None else "the validation data")
        if problems:
            logger.warning("%d samples failed the checks and are left out, the first: %s", len(problems), problems[0])
        weights = [source.weight for source in sources if source.weight is not None]
        return RecordLoader(
            Rows(samples, processor, self.max_text_tokens, self.deadline, self.pad_to_multiple_of),
            groups,
            self.batching,
            weights if weights and seed is not None else None,
            seed,
            self.skip,
            self.num_workers,
            self.trainer.global_rank if self.trainer is not None else 0,
            self.trainer.world_size if self.trainer is not None else 1,
        )

    def train_dataloader(self) -> RecordLoader:
        return self.loader(self.sources, self.seed)

    def val_dataloader(self) -> RecordLoader | list[Any]:
        return self.loader(self.val_sources, None) if self.val_sources else []
