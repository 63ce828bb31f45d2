"""What a claim is, and what its paired variants share: a small reader, and one plain training loop.

A claim says that one mask, or one way to count positions, learns better than another. Its variants differ in that
alone: they start from the same weights, see the same batches in the same order and answer the same questions. A run is
a function of claim, variant and seed.

Shape legend: R rows, V visual tokens, Q tokens of a question, L = V + Q, D width, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from mmzoo.language import LanguageModel, MultimodalConfig
from mmzoo.layout import TokenLayout

Scores = dict[str, float]
Curve = list[tuple[int, float]]
Advance = Callable[[], None]


class Batch(NamedTuple):
    """Questions about pixels.

    Attributes:
        pixels: [R, ...] as the claim's model takes them.
        question: int64 [R, Q].
        answer: int64 [R], a word.
        kinds: what each row asks.
    """

    pixels: Tensor
    question: Tensor
    answer: Tensor
    kinds: Sequence[str]


@dataclass(frozen=True)
class Claim:
    """A paper's claim, as it can be rerun small.

    Attributes:
        name: as `mmzoo reproduce` takes it.
        paper: where it is made.
        says: what the paper says.
        task: what is asked here, of what.
        variants: name -> what it is; the first is what the paper compares with.
        comparisons: (variant, baseline) pairs that are tested, seed by seed.
        metric: the score that they are compared by.
        steps: of a whole run.
        train: (variant, seed, steps, advance) -> scores and the curve of `metric`; calls `advance` after each step.
        levels: () -> for each score, what one reaches who lacks something, by counting in the questions of the test.
        caveats: what the numbers do not say.
    """

    name: str
    paper: str
    says: str
    task: str
    variants: Mapping[str, str]
    comparisons: Sequence[tuple[str, str]]
    metric: str
    steps: int
    train: Callable[[str, int, int, Advance], tuple[Scores, Curve]]
    levels: Callable[[], dict[str, dict[str, float]]]
    caveats: Sequence[str]


class Reader(nn.Module):
    """A small language model that reads visual tokens, then a question, and answers with one word.

    Args:
        words: W.
        rule, scheme, scheme_options: as `mmzoo.language.MultimodalConfig` takes them.
        width: D.
        layers: of the language model.
    """

    def __init__(
        self,
        words: int,
        rule: str = "causal",
        scheme: str = "sequential",
        scheme_options: dict[str, Any] | None = None,
        width: int = 64,
        layers: int = 2,
    ):
        super().__init__()
        backbone = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = LanguageModel(
            MultimodalConfig(backbone, rule=rule, scheme=scheme, scheme_options=scheme_options or {})
        )

    def forward(self, visual: Tensor, question: Tensor, layout: TokenLayout) -> Tensor:
        """Logits [R, W] of the answer.

        Args:
            visual: [R, V, D].
            question: int64 [R, Q].
            layout: [1, L, K], the same for all rows, so that mask and positions are made once.
        """
        embeddings = torch.cat([visual, self.model.get_input_embeddings()(question)], 1)
        outputs = self.model(
            inputs_embeds=embeddings,
            attention_mask=self.model.mask(layout, len(layout)),
            position_ids=self.model.scheme(layout),
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    lr: float,
    probe: Callable[[], float],
    advance: Advance,
    points: int = 20,
) -> Curve:
    """AdamW over `steps` batches under one cycle of the learning rate; `probe` is asked at `points` of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps), pct_start=0.1)
    every = max(1, steps // points)
    curve = [(0, probe())]
    model.train()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        loss = F.cross_entropy(model(batch.pixels, batch.question), batch.answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            curve.append((step, probe()))
            model.train()
        advance()
    return curve


@torch.no_grad()
def said(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """int64 [all rows]: the word that the model answers to each question."""
    model.eval()
    return torch.cat([model(batch.pixels, batch.question).argmax(-1) for batch in batches])


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> Scores:
    """The share of right answers, for each kind that the batches ask and over all of them ("all")."""
    right = said(model, batches) == torch.cat([batch.answer for batch in batches])
    return by_kind(right, batches)


def by_kind(right: Tensor, batches: Sequence[Batch]) -> Scores:
    """The mean of bool [all rows] for each kind, and over all rows ("all")."""
    kinds = [kind for batch in batches for kind in batch.kinds]
    scores = {"all": right.double().mean().item()}
    for kind in dict.fromkeys(kinds):
        scores[kind] = right[torch.tensor([kind == other for other in kinds])].double().mean().item()
    return scores
