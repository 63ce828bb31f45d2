"""Two rounds with two images under multi-modal causal attention, and its two masks as a picture.

    python scripts/examples/visualchat.py

Runs on a CPU in seconds. The model is tiny and its weights are random: the shapes are real, the answers mean nothing.
"""

from __future__ import annotations

import torch
from PIL import Image

import mmzoo
from mmzoo.attention import draw
from mmzoo.layout import TokenLayout
from mmzoo.models.visualchat import Round
from mmzoo.world import make_clip


def main() -> None:
    torch.manual_seed(0)
    model = mmzoo.load("visualchat-tiny", weights=None)
    first, second = (Image.fromarray(make_clip(seed).frames[-1]) for seed in (0, 1))
    rounds = [Round("what colour is the square", [first]), Round("and is there a circle here", [second])]
    said: list[Round] = []
    for one in rounds:
        inputs = model.processor.chat([*said, one])
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        said.append(Round(one.question, one.images, answer))
        print(f"{one.question}? {answer}")
    layout = TokenLayout(inputs["layout"])
    print(layout)
    print(f"drawn in {draw(model.rule, layout, 'visualchat_masks.png')}")


if __name__ == "__main__":
    main()
