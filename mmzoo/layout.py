"""TokenLayout: what each token of a multimodal batch is, as a few integers.

Shape legend: B batch, L tokens, K fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from mmzoo.errors import InputError


class Modality(IntEnum):
    """What a token carries.

    Compare tensors with `int(Modality.TEXT)`: under torch.compile a tensor == an IntEnum is silently false.
    """

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3
    LATENT = 4
    QUERY = 5


class Role(IntEnum):
    """PROMPT is given to the model (clean context), ANSWER is produced by it (or denoised)."""

    PROMPT = 0
    ANSWER = 1


FIELDS = ("index", "sample", "modality", "segment", "turn", "role", "frame", "row", "column")
PADDING = -1


class TokenLayout:
    """The layout of a (packed, padded) batch: one int32 tensor [B, L, K] with named views.

    One tensor, so that it survives device transfer, collation, beam expansion and `generate()`.

    Fields, each [B, L]:
        index: place in the sequence; a slice keeps it, so queries know where they stand among cached keys.
        sample: which packed sample; -1 is padding.
        modality: a `Modality`.
        segment: which contiguous span of the sample (a text run, one image, one clip).
        turn: dialogue turn, from 0.
        role: a `Role`.
        frame: time index inside the segment; -1 where there is none. "Same frame" means same sample, segment, frame.
        row, column: place on the patch grid; -1 where there is none.
    """

    def __init__(self, data: Tensor):
        if data.dim() != 3 or data.shape[-1] != len(FIELDS) or data.dtype != torch.int32:
            raise InputError(
                f"A TokenLayout holds an int32 tensor [B, L, {len(FIELDS)}], got {data.dtype} {tuple(data.shape)}."
            )
        self.data = data

    def __getattr__(self, name: str) -> Tensor:
        if name in FIELDS:
            return self.data[..., FIELDS.index(name)]
        raise AttributeError(f"TokenLayout has no field {name!r}; its fields are {', '.join(FIELDS)}.")

    def __len__(self) -> int:
        return self.data.shape[1]

    def __getitem__(self, tokens: slice) -> TokenLayout:
        """The layout of a slice of tokens, with their places in the whole sequence kept."""
        return TokenLayout(self.data[:, tokens])

    def __repr__(self) -> str:
        rows = []
        for b in range(self.data.shape[0]):
            runs = [f"{Modality(m).name.lower()} x{n}" if m >= 0 else f"padding x{n}" for m, n in self._runs(b)]
            rows.append(" | ".join(runs))
        return f"TokenLayout(batch={self.data.shape[0]}, tokens={len(self)}: " + "; ".join(rows) + ")"

    def _runs(self, b: int) -> list[tuple[int, int]]:
        kind = torch.where(self.sample[b] == PADDING, PADDING, self.modality[b])
        values, counts = torch.unique_consecutive(kind, return_counts=True)
        return list(zip(values.tolist(), counts.tolist(), strict=True))

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def valid(self) -> Tensor:
        """bool [B, L]: not padding."""
        return self.sample != PADDING

    @property
    def visual(self) -> Tensor:
        """bool [B, L]: image or video tokens."""
        return self.valid & ((self.modality == int(Modality.IMAGE)) | (self.modality == int(Modality.VIDEO)))

    @property
    def attention_mask(self) -> Tensor:
        """int64 [B, L]: the ordinary padding mask, 1 = valid."""
        return self.valid.long()

    def to(self, device: torch.device | str) -> TokenLayout:
        return TokenLayout(self.data.to(device))

    def field(self, name: str, values: Tensor) -> TokenLayout:
        """A copy with one field [B, L] replaced. Raises InputError for an unknown field."""
        if name not in FIELDS:
            raise InputError(f"TokenLayout has no field {name!r}; its fields are {', '.join(FIELDS)}.")
        data = self.data.clone()
        data[..., FIELDS.index(name)] = values.to(data.dtype)
        return TokenLayout(data)

    def runs(self, *fields: str) -> Tensor:
        """int64 [B, L]: numbers from 0 of the contiguous runs in which all the named fields stay the same."""
        values = torch.stack([getattr(self, name) for name in fields], -1)
        changed = (values[:, 1:] != values[:, :-1]).any(-1)
        return torch.nn.functional.pad(changed.long().cumsum(1), (1, 0))

    def with_answer(self, count: int = 1) -> TokenLayout:
        """The layout with `count` generated text tokens appended, in the sample of each row's last token."""
        places = torch.arange(len(self) + count, device=self.data.device)
        end = torch.where(self.valid, places[: len(self)], 0).amax(1)
        last = self.data.gather(1, end[:, None, None].expand(-1, 1, len(FIELDS)))
        new = last.repeat(1, count, 1)
        fields = {name: new[..., i] for i, name in enumerate(FIELDS)}  # views
        fields["index"][:] = places[len(self) :] + self.index[:, :1]
        fields["segment"] += ((fields["modality"] != int(Modality.TEXT)) | (fields["role"] != int(Role.ANSWER))).int()
        fields["modality"].fill_(int(Modality.TEXT))
        fields["role"].fill_(int(Role.ANSWER))
        new[..., FIELDS.index("frame") :] = -1  # frame, row and column
        return TokenLayout(torch.cat([self.data, new], 1))

    def padded_to(self, length: int) -> TokenLayout:
        """The layout padded on the right to `length` tokens, as the slots of a static cache are."""
        padded = _pad(self.data, length, "right")
        return padded.field("index", padded.index + self.index[:, :1])


@dataclass(frozen=True)
class Span:
    """Contiguous tokens of one kind: `frames * rows * columns` visual tokens (frame-major), or `rows` text tokens.

    Attributes:
        grid: whether rows and columns are places on a patch grid. Resampled tokens have a frame but no place.
    """

    modality: Modality
    frames: int = 1
    rows: int = 1
    columns: int = 1
    role: Role = Role.PROMPT
    turn: int = 0
    grid: bool = True

    def __post_init__(self) -> None:
        if min(self.frames, self.rows, self.columns) < 0 or self.turn < 0:
            raise InputError(f"A span cannot have a negative size or turn: {self}.")

    def __len__(self) -> int:
        return self.frames * self.rows * self.columns


def text(length: int, role: Role = Role.PROMPT, turn: int = 0) -> Span:
    """`length` text tokens."""
    return Span(Modality.TEXT, rows=length, role=role, turn=turn, grid=False)


def image(rows: int, columns: int = 1, *, grid: bool = True) -> Span:
    """One image of `rows * columns` tokens in raster order."""
    return Span(Modality.IMAGE, rows=rows, columns=columns, grid=grid)


def video(frames: int, rows: int, columns: int = 1, *, grid: bool = True) -> Span:
    """One clip, frame-major."""
    return Span(Modality.VIDEO, frames=frames, rows=rows, columns=columns, grid=grid)


def lay_out(*spans: Span) -> TokenLayout:
    """The layout [1, L, K] of one sample made of spans in order."""
    parts, segment = [], 0
    for span in spans:
        if len(span) == 0:
            continue
        parts.append(_span_fields(span, segment))
        segment += 1
    data = torch.cat(parts) if parts else torch.empty(0, len(FIELDS), dtype=torch.int32)
    data[:, FIELDS.index("index")] = torch.arange(len(data), dtype=torch.int32)
    return TokenLayout(data[None])


def _span_fields(span: Span, segment: int) -> Tensor:
    frame, row, column = torch.meshgrid(
        torch.arange(span.frames), torch.arange(span.rows), torch.arange(span.columns), indexing="ij"
    )
    none = torch.full((len(span),), -1)
    fields = {
        "index": none,
        "sample": torch.zeros_like(none),
        "modality": none.new_full(none.shape, span.modality),
        "segment": none.new_full(none.shape, segment),
        "turn": none.new_full(none.shape, span.turn),
        "role": none.new_full(none.shape, span.role),
        "frame": none if span.modality == Modality.TEXT else frame.flatten(),
        "row": row.flatten() if span.grid else none,
        "column": column.flatten() if span.grid else none,
    }
    return torch.stack([fields[name] for name in FIELDS], -1).to(torch.int32)


def _pad(data: Tensor, length: int, side: str) -> TokenLayout:
    missing = length - data.shape[1]
    if missing < 0:
        raise InputError(f"Cannot pad {data.shape[1]} tokens to {length}.")
    padding = data.new_full((data.shape[0], missing, data.shape[2]), -1)
    parts = [data, padding] if side == "right" else [padding, data]
    padded = torch.cat(parts, 1)
    padded[..., FIELDS.index("index")] = torch.arange(length, dtype=torch.int32, device=data.device)
    return TokenLayout(padded)


def batch(layouts: Sequence[TokenLayout], padding_side: str = "right", length: int = 0) -> TokenLayout:
    """Layouts of several rows as one batch, padded on one side to the longest, or to `length` if that is more."""
    if padding_side not in ("left", "right"):
        raise InputError(f"padding_side is 'left' or 'right', got {padding_side!r}.")
    if not layouts:
        raise InputError("A batch needs at least one layout.")
    length = max(length, *(len(layout) for layout in layouts))
    return TokenLayout(torch.cat([_pad(layout.data, length, padding_side).data for layout in layouts]))


def pack(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """Several samples [1, L_i, K] packed into one row [1, sum L_i, K]; samples never see each other."""
    if not layouts:
        raise InputError("A pack needs at least one layout.")
    data, first = [], 0
    for layout in layouts:
        samples = layout.sample
        data.append(layout.field("sample", torch.where(layout.valid, samples + first, samples)).data)
        first += int(samples.max()) + 1 if len(layout) else 0
    return _pad(torch.cat(data, 1), sum(len(layout) for layout in layouts), "right")


def splice(
    token_ids: Sequence[int],
    media: Iterable[Span],
    *,
    place_id: int,
    answer_marker: int | Sequence[int] | None = None,
    turn_marker: int | Sequence[int] | None = None,
) -> tuple[list[int], TokenLayout]:
    """One sample's ids with each `place_id` repeated for the tokens of its medium, and the layout of the result.

    Roles: text is PROMPT up to and including `answer_marker`; then ANSWER until `turn_marker`, which opens the next
    turn. Without any answer marker all text is ANSWER (a caption: everything in it is a target).

    Args:
        token_ids: one sample, without padding.
        media: what stands at each place, in order.
        place_id: the id that marks one medium, such as `<image>`.
        answer_marker: the id, or the ids in a row, after which the model speaks, such as `<|assistant|>`.
        turn_marker: the id, or the ids in a row, with which the user speaks again, such as `<|user|>`.

    Raises:
        InputError: the number of places is not the number of media.
    """
    media = list(media)
    places = sum(token == place_id for token in token_ids)
    if places != len(media):
        raise InputError(
            f"The text has {places} media places (token id {place_id}), but {len(media)} media were given. "
            "Give one medium for each place."
        )
    answers, turns = _found(token_ids, answer_marker, end=True), _found(token_ids, turn_marker)
    role = Role.PROMPT if answers else Role.ANSWER
    turn, ids, spans, remaining = 0, [], [], iter(media)
    for i, token in enumerate(token_ids):
        role = Role.ANSWER if i in answers else role
        if token == place_id:
            spans.append(replace(next(remaining), turn=turn))
            ids.extend([token] * len(spans[-1]))
            continue
        if i in turns and role == Role.ANSWER and answers:
            role, turn = Role.PROMPT, turn + 1
        if spans and spans[-1].modality == Modality.TEXT and (spans[-1].role, spans[-1].turn) == (role, turn):
            spans[-1] = text(len(spans[-1]) + 1, role, turn)
        else:
            spans.append(text(1, role, turn))
        ids.append(token)
    return ids, lay_out(*spans)


def _found(token_ids: Sequence[int], marker: int | Sequence[int] | None, end: bool = False) -> set[int]:
    """Where the marker stands: its first places, or the places after its last."""
    wanted = [] if marker is None else [marker] if isinstance(marker, int) else list(marker)
    size, ids = len(wanted), list(token_ids)
    return {i + size * end for i in range(len(ids) - size + 1) if size and ids[i : i + size] == wanted}
