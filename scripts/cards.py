"""Write model_cards/<name>.md for every registered model."""

from pathlib import Path

import mmzoo
from mmzoo.cards import card
from mmzoo.files import replacing
from mmzoo.registry import entry

if __name__ == "__main__":
    for name in mmzoo.list_models():
        with replacing(Path(__file__).parent.parent / "model_cards" / f"{name}.md") as temporary:
            temporary.write_text(card(entry(name)))
