"""The runner: items asked in batches, over any number of processes, recorded as they are answered, summed up once.

    items ──batches i with i mod shards == shard──▶ responses/<shard>-of-<shards>.jsonl (append-only)
    responses of every shard ──▶ results.jsonl (in the items' order), scores.json

Batches are cut from the whole list of items, whatever the number of processes, and a batch that was begun is asked
again as a whole. So the results file is the same to the byte for any number of shards, and after a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmzoo.errors import AudioReadError, EvaluationError, InputError, MmzooError, VideoReadError
from mmzoo.files import replacing
from mmzoo.integrity import weights_sha256
from mmzoo.language import MultimodalLM
from mmzoo.media import Video
from mmzoo_eval.asking import Media, responses
from mmzoo_eval.benchmark import ANSWERED, FAILED, UNREADABLE, Benchmark, Item, Judged, Prompt, Protocol, judged
from mmzoo_eval.scoring import label, scored
from mmzoo_eval.subtitles import shown

RESPONSES, RESULTS, SCORES = "responses", "results.jsonl", "scores.json"
GIVE_UP_AFTER = 20


@dataclass(frozen=True)
class Response:
    """One line of a shard's file.

    Attributes:
        key: of what decides it: weights, media, prompt, frames, and how the answer is made.
        state: "answered" (whatever it says), "unreadable media" or "model error".
        response: the model's words.
        decoder: what read the video, with its version.
        note: the error, or what was remarkable about the video.
    """

    id: str
    key: str
    state: str
    response: str | None = None
    decoder: str = ""
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One model on one benchmark by one protocol.

    Attributes:
        model: in evaluation mode, with its processor.
        benchmark: what is asked.
        protocol: how it is asked, judged and summed up.
        items: all of them, whatever the shard.
        media: how pictures and videos are read.
        folder: of the results; the responses of an interrupted run are there.
        batch_size: items of a batch.
        shard: of this process, from 0.
        shards: processes.
    """

    model: MultimodalLM
    benchmark: Benchmark
    protocol: Protocol
    items: Sequence[Item]
    media: Media
    folder: Path
    batch_size: int = 1
    shard: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        if self.protocol.own is not None:
            object.__setattr__(self, "items", list(map(self.protocol.own, self.items)))
        names = [item.id for item in self.items]
        if self.protocol.prompt is None:
            raise InputError(f"The protocol {self.protocol.name!r} judges answers only. Take one that also asks.")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})[:3]
            raise InputError(f"Items of {self.benchmark.title} share their ids: {', '.join(twice)}.")
        if self.protocol.answers != "text" and not all(item.options for item in self.items):
            raise InputError(f"Likelihoods need options, which {self.benchmark.title} does not give to every item.")
        if not (self.batch_size > 0 and 0 <= self.shard < self.shards):
            raise InputError(f"No batch of {self.batch_size}, or no shard {self.shard} of {self.shards}.")

    def prompt(self, item: Item, medium: Any = None) -> Prompt:
        """What is said to an item that shows this; without it, what decides that, for a digest."""
        assert self.protocol.prompt is not None
        return self.protocol.prompt(shown(item, medium if isinstance(medium, Video) else None))


def run(plan: Run, advance: Callable[[int, int, str], None] = lambda done, total, state: None) -> dict[str, Any] | None:
    """Ask what has not been answered yet in this shard; sum up if every shard is done.

    Args:
        plan: what is to be done.
        advance: told the items done and all items of this shard, and the state of the latest.

    Returns:
        the content of scores.json; None while other shards have items left.

    Raises:
        EvaluationError: the device's memory is too small, or one model error follows another.
    """
    weights = weights_sha256(plan.model.state_dict())
    keys = _keys(plan, weights)
    known = {key: row for key, row in recorded(plan.folder).items() if row.state != FAILED}
    batches = [range(i, min(i + plan.batch_size, len(keys))) for i in range(0, len(keys), plan.batch_size)]
    mine = batches[plan.shard :: plan.shards]
    left = [batch for batch in mine if any(keys[i] not in known for i in batch)]
    total, failures = sum(map(len, mine)), 0
    done = total - sum(map(len, left))
    advance(done, total, "")
    with _appending(plan.folder / RESPONSES / f"{plan.shard}-of-{plan.shards}.jsonl") as write:
        for batch, media in _reading_ahead(plan, left):
            for row in _answered(plan, [plan.items[i] for i in batch], [keys[i] for i in batch], media):
                write(row)
                done += 1
                failures = failures + 1 if row.state == FAILED else 0
                advance(done, total, row.state)
            if failures >= GIVE_UP_AFTER:
                raise EvaluationError(f"{failures} model errors in a row, the last one: {row.note}")
    return _summed_up(plan, keys, weights)


def _keys(plan: Run, weights: str) -> list[str]:
    """What decides each item's response, as one digest."""
    digests: dict[str, str] = {}
    keys = []
    for item in plan.items:
        if item.media not in digests:
            digests[item.media] = plan.media.sha256(item)
        decided = {
            "weights": weights,
            "model": type(plan.model).__name__,
            "benchmark": plan.benchmark.name,
            "protocol": plan.protocol.name,
            "item": item.id,
            "prompt": plan.prompt(item),
            "media": digests[item.media],
            "bound": item.bound,
            "stop": item.details.get("cut_frame"),
            "frames": asdict(plan.media.frames.of(plan.model.processor)),
            "max_new_tokens": plan.protocol.max_new_tokens,
        }
        keys.append(hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest())
    return keys


def recorded(folder: Path) -> dict[str, Response]:
    """Key -> response of every shard's file; a line that was cut off by a kill is left out."""
    found: dict[str, Response] = {}
    for path in sorted((folder / RESPONSES).glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                row = Response(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if row.key not in found or found[row.key].state == FAILED:
                found[row.key] = row
    return found


class _appending:
    """Writes a line a response at the end of a file, and sees it to the disk."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")

    def __enter__(self) -> Callable[[Response], None]:
        self.file.write(b"\n")  # ends a line that was cut off
        return self._write

    def _write(self, row: Response) -> None:
        self.file.write(json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _reading_ahead(plan: Run, batches: Iterable[range]) -> Iterator[tuple[range, list[Any]]]:
    """Batches with what they show, or the error in its place; the next is read while one is answered."""
    with ThreadPoolExecutor(1) as reader:
        waiting: list[tuple[range, list[Any]]] = []
        for batch in batches:
            waiting.append((batch, [reader.submit(_read, plan, plan.items[i]) for i in batch]))
            if len(waiting) > 1:
                ready, futures = waiting.pop(0)
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]


def _read(plan: Run, item: Item) -> Any:
    try:
        return plan.media.read(item, plan.model.processor)
    except (AudioReadError, VideoReadError) as error:
        return error
    except InputError as error:
        if plan.benchmark.media == "image":
            return error
        raise


def _answered(plan: Run, items: list[Item], keys: list[str], media: list[Any]) -> list[Response]:
    """The responses of one batch; if the model fails on it, each item is asked alone, so that one costs one."""
    readable = [i for i, medium in enumerate(media) if not isinstance(medium, MmzooError)]
    try:
        told = _asked(plan, [items[i] for i in readable], [media[i] for i in readable]) if readable else []
        said = dict(zip(readable, told, strict=True))
    except torch.OutOfMemoryError as error:
        raise EvaluationError(f"The device ran out of memory on a batch of {len(items)}: {error}") from error
    except Exception as error:  # whatever a model raises is a counted state of the item, and never its answer
        if len(items) > 1:
            alone = zip(items, keys, media, strict=True)
            return [row for item, key, medium in alone for row in _answered(plan, [item], [key], [medium])]
        return [Response(items[0].id, keys[0], FAILED, note=f"{type(error).__name__}: {error}")]
    rows = []
    for i, (item, key, medium) in enumerate(zip(items, keys, media, strict=True)):
        if i not in said:
            rows.append(Response(item.id, key, UNREADABLE, note=str(medium)))
            continue
        shown = (medium.backend, "; ".join(medium.notes)) if isinstance(medium, Video) else ("", "")
        rows.append(Response(item.id, key, ANSWERED, said[i], *shown))
    return rows


def _asked(plan: Run, items: list[Item], media: list[Any]) -> list[str]:
    return responses(plan.model, plan.protocol, items, list(map(plan.prompt, items, media)), media)


def _summed_up(plan: Run, keys: Sequence[str], weights: str) -> dict[str, Any] | None:
    """Write results.jsonl and scores.json if every item has a response; returns the scores, else None."""
    known = recorded(plan.folder)
    if any(key not in known for key in keys):
        return None
    rows = [known[key] for key in keys]
    results = [_judged(item, row, plan.protocol) for item, row in zip(plan.items, rows, strict=True)]
    with replacing(plan.folder / RESULTS) as temporary:
        temporary.write_text("".join(map(_line, results, rows)))
    decoders = [] if plan.benchmark.make else sorted({row.decoder for row in rows if row.decoder})
    prompts = [plan.prompt(item) for item in plan.items]
    told = label(plan.benchmark, plan.protocol, plan.media.frames, decoders, plan.model.processor, prompts)
    found = {"label": told, **scored(plan.benchmark, plan.protocol, results)}
    found |= {"weights_sha256": weights, "decoders": decoders}
    with replacing(plan.folder / SCORES) as temporary:
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _judged(item: Item, row: Response, protocol: Protocol) -> Judged:
    if row.state != ANSWERED or row.response is None:
        return Judged(item, None, None, row.state)
    return judged(item, row.response, protocol)


def _line(result: Judged, row: Response) -> str:
    item, verdict = result.item, result.verdict
    written = {
        "id": item.id,
        "kind": item.kind,
        "cluster": item.cluster,
        "state": result.state,
        "response": result.response,
        "parsed": verdict and verdict.parsed,
        "score": verdict and verdict.score,
        "answer": item.answer,
        "key": row.key,
        "decoder": row.decoder,
        "note": row.note,
    }
    return json.dumps(written, ensure_ascii=False) + "\n"
