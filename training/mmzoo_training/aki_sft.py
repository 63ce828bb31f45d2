"""AKI's supervised fine-tuning: task templates, labels, collation, learning rate.

Source: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
arXiv 2503.02597, and the authors' configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmzoo.errors import InputError
from mmzoo.models.aki import sft_prompt

SHORT_ANSWER = "Answer the question using a single word or phrase. "
LETTER = "Answer with the option's letter from the given choices directly. "

TEMPLATES: dict[str, tuple[str, str]] = {
    "vqa": (SHORT_ANSWER + "{question}", "{answer}"),
    "ocrvqa": (SHORT_ANSWER + "{question}", "{answer}"),
    "gqa": (SHORT_ANSWER + "{question}", "{answer}"),
    "vsr": (SHORT_ANSWER + "{question_interro} Please answer yes or no.", "{answer}"),
    "aokvqa": (LETTER + "{question}\nOptions:\n{option}\n", "{answer}"),
    "scienceqa": (LETTER + "{question}\nContext: {context}\nOptions:\n{option}\n", "{answer}"),
    **dict.fromkeys(
        ("refcoco", "refcocop", "refcocog", "vg"), ("Provide a short description for this region. {bbox}", "{phrase}")
    ),
}
"""Data set -> (question, answer)."""


def sft_text(dataset: str, example: Mapping[str, str], has_image: bool = True) -> str:
    """The training string of one example, before tokenisation. Raises InputError for an unknown data set."""
    if dataset not in TEMPLATES:
        raise InputError(f"No template for the data set {dataset!r}. Known: {', '.join(TEMPLATES)}.")
    question, answer = TEMPLATES[dataset]
    return sft_prompt(question.format(**example), "<image>" if has_image else "") + answer.format(**example)


def pretraining_text(caption: str) -> str:
    """The training string of one captioned image; it has no assistant marker, so the mask is plain causal."""
    return f"<image>{caption.strip()}<|endofchunk|>"


def llava_samples(record: Mapping[str, Any], image_folder: str) -> list[dict[str, str]]:
    """A LLaVA-150k record as single-turn samples: every question gets its own `<image>`, earlier turns are dropped."""
    turns = [turn["value"] for turn in record["conversations"]]
    return [
        {
            "image": f"{image_folder}/{record['image']}",
            "task_type": "llava_inst",
            "text": sft_prompt(question.replace("<image>", "").strip()) + answer,
        }
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
    ]


def vsr_sample(
    row: Mapping[str, Any], image_folders: Mapping[str, str], *, upstream_split: bool = False
) -> dict[str, Any]:
    """A VSR row as a yes/no question.

    Args:
        row: image_link, caption, label.
        image_folders: "train" and "val" -> folder of COCO images.
        upstream_split: cut the caption at every "is", inside words too, as the authors' code does.
    """
    caption = row["caption"]
    statement = caption[0].lower() + caption[1:].rstrip(".")
    parts = statement.split("is") if upstream_split else statement.split(" is ", 1)
    question = f"Is {' '.join(part.strip() for part in parts)}?"
    split, name = row["image_link"].split("/")[-2:]
    return {
        "examples": [{"question": caption, "question_interro": question, "answer": "yes" if row["label"] else "no"}],
        "task_type": "vsr_vqa",
        "image": f"{image_folders['train' if 'train' in split else 'val']}/{name}",
    }


def box(x: float, y: float, width: float, height: float, image_width: float, image_height: float) -> str:
    """Pixels -> `<bbox>[x1, y1][x2, y2]</bbox>`, normalised, three decimals."""
    x1, y1, x2, y2 = x / image_width, y / image_height, (x + width) / image_width, (y + height) / image_height
    return f"<bbox>[{x1:.3f}, {y1:.3f}][{x2:.3f}, {y2:.3f}]</bbox>"


def encode(ids: Sequence[int], max_length: int, assistant_id: int) -> dict[str, list[int]]:
    """Ids cut at `max_length`, with labels: -100 up to and including `<|assistant|>`.

    A text without that marker, or with several, trains nothing, as in the authors' code.
    """
    ids = list(ids[:max_length])
    start = ids.index(assistant_id) + 1 if ids.count(assistant_id) == 1 else len(ids)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * start + ids[start:]}


def collate(encoded: Sequence[Mapping[str, list[int]]], length: int, pad_id: int) -> dict[str, list[list[int]]]:
    """Rows padded on the right to `length`."""
    fill = {"input_ids": pad_id, "labels": -100, "attention_mask": 0}
    return {key: [row[key] + [value] * (length - len(row[key])) for row in encoded] for key, value in fill.items()}


def learning_rate(step: int, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from min_lr to lr, then half a cosine down to min_lr, and min_lr after the end."""
    if step < warmup_steps:
        return min_lr + (lr - min_lr) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
