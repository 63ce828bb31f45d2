"""FAVOR's claim: sound and sight, synchronised and read by a causal Q-Former, are understood together.

Source: "Fine-grained Audio-Visual Joint Representations for Multimodal Large Language Models", arXiv 2310.05863.

Shape legend: C films, R questions about them, T frames, V cells of a frame, P values of a cell's pixels, A audio steps
of a frame, M bands, N queries, D width, W words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmzoo import masks
from mmzoo.connectors.causal_qformer import AudioVisualQFormer, synchronise
from mmzoo.world import COLOURS, SHAPES
from mmzoo_training.claim_cells import fixed, looks, pixels_of, stream
from mmzoo_training.claims import Advance, Batch, Claim, Curve, Scores, accuracy, train

TONES, BOTH = ("low", "middle", "high"), ("before", "with", "after")
FRAMES, CELLS, STEPS, BANDS, NOISE = 6, 2, 2, 6, 0.3
TIMES = tuple(f"frame {number}" for number in range(1, FRAMES + 1))
WORDS = (*COLOURS, "none", *TIMES)
ASKED = (
    *((kind, tone) for kind in BOTH for tone in TONES),
    *(("sight", time) for time in TIMES),
    *(("sound", tone) for tone in TONES),
)
KINDS = tuple(dict.fromkeys(kind for kind, _ in ASKED))
"""Kind and subject of all questions about a film."""
BATCH, TEST_FILMS, PROBE_FILMS = 32, 400, 60
WIDTH, HIDDEN, QUERIES, INNER, LR, SHARP = 64, 32, 4, 128, 2e-3, 3.0
OPTIONS: dict[str, dict[str, Any]] = {
    "no frame block": {"block": None},
    "unmasked": {"block": "bidirectional"},
    "past": {"block": "past"},
    "future": {"block": "future"},
    "past, late fusion": {"block": "past", "late": QUERIES},
    "past, late fusion, as many tokens": {"block": "past", "late": QUERIES // 2},
}


class FilmReader(nn.Module):
    """Cells and bands through one linear layer each, the connector of FAVOR, and two layers that read all its tokens.

    Args:
        block: what frames see of each other before the queries read them: "past" or "future", "bidirectional", or
            nothing (None), without the parameters for it.
        late: the two streams are read one after the other, with the same weights and so many queries each, and meet
            after the connector; 0 for streams that are read together.
    """

    def __init__(self, block: str | None, late: int = 0):
        super().__init__()
        self.late = late
        self.patch = nn.Linear(looks().shape[1], HIDDEN)
        self.connector = AudioVisualQFormer(
            [BANDS],
            WIDTH,
            HIDDEN,
            QUERIES,
            FRAMES,
            num_heads=4,
            intermediate_size=2 * HIDDEN,
            audio_per_frame=STEPS,
            direction="past" if block == "past" else "future",
            max_positions=FRAMES * CELLS,
        )
        self.sharpen(SHARP)
        # Changed and made last, so that all variants of a seed start from the same weights as far as they have them.
        if block == "bidirectional":
            self.connector.rule = masks.bidirectional()
        for layer in self.connector.video_Qformer.layers if block is None else ():
            layer.encoder_causal_attention = None
        if late:
            self.connector.video_query_tokens = nn.Parameter(self.connector.video_query_tokens[:, :late].detach())
        self.inner = nn.Linear((2 * late or QUERIES) * WIDTH, INNER)
        self.answer = nn.Linear(INNER, len(ASKED) * len(WORDS))

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Let attention begin less uniform than layers do by themselves, so that queries soon see single frames."""
        for name, parameter in self.connector.video_Qformer.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter *= factor

    def forward(self, streams: Tensor, question: Tensor) -> Tensor:
        """Logits [R, W]; streams [C, T, V * P + A * M]; questions int64 [R, 1], numbers in `ASKED`, R / C of each."""
        cells, bands = streams.split((CELLS * looks().shape[1], STEPS * BANDS), -1)
        seen = self.patch(cells.unflatten(-1, (CELLS, -1)))
        heard = self.connector.audio_features(bands.unflatten(-1, (STEPS, -1)).flatten(1, 2))
        shown = [(1, 0), (0, 1)] if self.late else [(1, 1)]
        tokens = [self.read(seen, heard, seen.new_tensor(one).expand(len(seen), 2)) for one in shown]
        every = self.answer(self.inner(torch.cat(tokens, 1).flatten(1)).relu()).unflatten(1, (len(ASKED), -1))
        film = torch.arange(len(question)) // (len(question) // len(streams))
        return every[film, question[:, 0]]

    def read(self, seen: Tensor, heard: Tensor, shown: Tensor) -> Tensor:
        """Tokens [C, N, D] of one window; shown [C, 2] silences a stream."""
        joint = synchronise(seen, heard, STEPS, shown)
        return self.connector(joint, torch.full((len(joint),), FRAMES))[:, 0]


def films(number: int, generator: torch.Generator) -> Batch:
    """All questions about films in which every frame has another colour, in one cell, and three frames a tone.

    What needs both streams: which colour is seen right before, with and right after each tone, or none. What needs one:
    the colour of each frame, and the frame of each tone.
    """
    colours = torch.rand(number, len(COLOURS), generator=generator).argsort(1)[:, :FRAMES]
    when = torch.rand(number, FRAMES, generator=generator).argsort(1)[:, : len(TONES)]
    tones = torch.full((number, FRAMES), -1).scatter(1, when, torch.arange(len(TONES)).expand(number, -1))
    shown = nn.functional.pad(colours, (1, 1), value=WORDS.index("none"))
    both = torch.stack([shown.gather(1, when + shift) for shift in range(len(BOTH))], 1)
    answer = torch.cat([both.flatten(1), colours, WORDS.index(TIMES[0]) + when], 1)
    asked, kinds = torch.arange(len(ASKED)).repeat(number)[:, None], [kind for kind, _ in ASKED] * number
    return Batch(rendered(colours, tones, generator), asked, answer.flatten(), kinds)


def rendered(colour: Tensor, tone: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [C, T, V * P + A * M]: noisy cells, one of which flashes in any shape, and noisy bands, two to a tone."""
    shape = torch.randint(len(SHAPES), colour.shape, generator=generator)
    cell = torch.randint(CELLS, colour.shape, generator=generator)
    look = torch.where(colour < 0, -1, colour * len(SHAPES) + shape)
    cells = torch.full((*colour.shape, CELLS), -1).scatter(2, cell[..., None], look[..., None])
    loud = (torch.arange(BANDS) // (BANDS // len(TONES)) == tone[..., None]).float()
    bands = loud[:, :, None].expand(-1, -1, STEPS, -1)
    bands = bands + NOISE * torch.randn(bands.shape, generator=generator)
    seen = pixels_of(cells.flatten(1), generator).unflatten(1, colour.shape[1:] + (CELLS,))
    return torch.cat([seen.flatten(2), bands.flatten(2)], -1)


def training(seed: int) -> Iterator[Batch]:
    generator = stream(seed)
    while True:
        yield films(BATCH, generator)


def scores(model: nn.Module, number: int) -> Scores:
    """The share of right answers, where both streams are needed and for each kind."""
    found = accuracy(model, fixed(films, number))
    return {"accuracy": sum(found[kind] for kind in BOTH) / len(BOTH), **{kind: found[kind] for kind in KINDS}}


def run(variant: str, seed: int, steps: int, advance: Advance) -> tuple[Scores, Curve]:
    """Train one variant, and ask it about new films."""
    torch.manual_seed(seed)
    model = FilmReader(**OPTIONS[variant])
    curve = train(model, training(seed), steps, LR, lambda: scores(model, PROBE_FILMS)["accuracy"], advance)
    return scores(model, TEST_FILMS), curve


def levels() -> dict[str, dict[str, float]]:
    """By symmetry: who lacks a stream takes each tone for heard in any frame, or each colour for seen in any."""
    return {"sees or hears, not both": dict.fromkeys(("accuracy", *BOTH), 1 / FRAMES)}


CLAIM = Claim(
    name="causal-qformer",
    paper="FAVOR, arXiv 2310.05863",
    says="Sound and sight that are synchronised frame by frame, and a block in which frames attend to earlier ones "
    "before the queries read them, let a Q-Former catch what needs both streams and the order in time.",
    task=f"Films of {FRAMES} frames, each with another colour and three of them with a tone: which colour is seen "
    f"right before, with, and right after each tone; {QUERIES} queries read the {FRAMES * CELLS} tokens of a film's "
    "one window. In training it is also asked what one stream tells: the colour of a frame, the frame of a tone.",
    variants={
        "no frame block": "queries read the frames as they are: a plain Q-Former on windows",
        "unmasked": "frames attend to all frames first: the same block without its mask",
        "past": "frames attend to themselves and earlier ones first: the paper's",
        "future": "to themselves and later ones: what the released weights need",
        "past, late fusion": "as `past`, but the streams are read one after the other, by all queries each: twice as "
        "many tokens",
        "past, late fusion, as many tokens": "the same with half of the queries",
    },
    comparisons=(
        ("past", "no frame block"),
        ("future", "no frame block"),
        ("unmasked", "no frame block"),
        ("past", "unmasked"),
        ("past", "future"),
        ("past", "past, late fusion"),
        ("past", "past, late fusion, as many tokens"),
    ),
    metric="accuracy",
    steps=1500,
    train=run,
    levels=levels,
    caveats=(
        "Two layers that read all tokens and have an output for each question stand in for the language model, which "
        "takes far longer to learn to read them. They know which token is which, as each always has the same place.",
        "The frame block brings parameters; `unmasked` has as many and tells what of its effect the mask has.",
        "One window of few frames: nothing is said of what reaches over windows.",
    ),
)
