"""NExT-QA's open answers: lemmas, WordNet's rules and WUPS on a WordNet of a dozen words."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmzoo.errors import DatasetError, InputError, MissingExtra
from mmzoo_eval import english
from mmzoo_eval import wordnet as wordnet_module
from mmzoo_eval.benchmark import Item, judged
from mmzoo_eval.benchmarks import benchmark, next_qa_open
from mmzoo_eval.english import singular, tokens
from mmzoo_eval.wordnet import ROOT, Synset, WordNet, packaged_files

ROOT_FOLDER = Path(__file__).resolve().parent.parent

# words of the synset, part (s: an adjective's satellite), what stands above it: "@" as a kind, "@i" as an instance
SYNSETS = {
    "entity": (["entity"], "n", []),
    "animal": (["animal", "beast"], "n", ["@ entity"]),
    "dog": (["dog", "hot_dog"], "n", ["@ animal"]),
    "puppy": (["puppy"], "n", ["@ dog"]),
    "rex": (["Rex"], "n", ["@i dog"]),
    "toy": (["toy"], "n", ["@ entity"]),
    "plush": (["plush_dog"], "n", ["@ toy", "@ dog"]),
    "rag": (["rag"], "n", ["@ plush"]),
    "child": (["child"], "n", ["@ animal"]),
    "move": (["move"], "v", []),
    "run": (["run", "dog"], "v", ["@ move"]),
    "sit": (["sit"], "v", []),
    "red": (["red(a)"], "a", []),
    "scarlet": (["scarlet"], "s", []),
    "loudly": (["loudly"], "r", []),
}
FILES = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
EXCEPTIONS = {"noun": "children child\nmooses moose\n", "verb": "ran run\n", "adj": "", "adv": ""}


def write_wordnet(folder: Path, line_end: str = "\n") -> Path:
    """The files of a little WordNet, as the real ones are built."""
    places: dict[str, int] = {}
    for final in (False, True):  # offsets have eight digits, so the first pass finds them
        contents = {name: "  1 a licence stands here\n" for name in FILES.values()}
        for name, (words, part, above) in SYNSETS.items():
            content = contents[FILES[part]]
            places[name] = len(content)
            upwards = [relation.split() for relation in above]
            pointers = [f"{kind} {places.get(up, 0):08d} {SYNSETS[up][1]} 0000" for kind, up in upwards]
            pointers.append("~ 00000000 n 0000")
            fields = [f"{places[name]:08d} 03 {part} {len(words):02x}", *(f"{word} 0" for word in words)]
            fields += [f"{len(pointers):03d}", *pointers]
            contents[FILES[part]] = content + " ".join(fields) + " | a gloss; @ 00000000\n"
        if final:
            break
    for file in set(FILES.values()):
        senses: dict[str, list[int]] = {}
        for name, (words, part, _) in SYNSETS.items():
            if FILES[part] == file:
                for word in words:
                    senses.setdefault(word.partition("(")[0].lower(), []).append(places[name])
        lines = ["  1 a licence stands here"]
        for word, offsets in senses.items():
            found = " ".join(f"{offset:08d}" for offset in offsets)
            lines.append(f"{word} {file[0]} {len(offsets)} 2 @ ~ {len(offsets)} 0 {found}")
        index = "\n".join(lines) + "\n"
        for kind, content in ((f"data.{file}", contents[file]), (f"index.{file}", index), (f"{file}.exc", "")):
            content = EXCEPTIONS[file] if kind.endswith(".exc") else content
            (folder / kind).write_bytes(content.replace("\n", line_end).encode())
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


@pytest.fixture(scope="module")
def old(files: Path) -> WordNet:
    return WordNet(files, "nltk3.5")


@pytest.fixture(scope="module")
def new(files: Path) -> WordNet:
    return WordNet(files, "nltk3.10.4")


def test_base_forms(old: WordNet, new: WordNet) -> None:
    assert old.base_forms("dogs", "n") == ["dog"]
    assert old.base_forms("puppies", "n") == ["puppy"]
    assert old.base_forms("children", "n") == ["child"]  # by the list of exceptions
    assert old.base_forms("mooses", "n") == []  # an exception that WordNet does not hold
    assert old.base_forms("Running", "v") == []  # no rule halves a consonant
    assert old.base_forms("moved", "v") == ["move"]
    assert old.base_forms("red", "a") == ["red"]
    assert old.base_forms("redest", "a") == ["red"]
    # the older release goes on with what the first replacement gave
    assert old.base_forms("dogss", "n") == ["dog"]
    assert new.base_forms("dogss", "n") == []
    assert old.lemma("dogs", "n") == "dog"
    assert old.lemma("cats", "n") == "cats"


def test_the_first_sense_of_the_first_part_of_speech(old: WordNet) -> None:
    assert old.name(old.first_synset("dogs")) == "dog.n.01"
    assert old.name(old.first_synset("ran")) == "run.v.01"
    assert old.name(old.first_synset("scarlet")) == "scarlet.s.01"
    assert old.name(old.first_synset("red")) == "red.a.01"
    assert old.name(old.first_synset("rex")) == "rex.n.01"
    assert old.first_synset("cat") is None


def test_wup_by_hand(old: WordNet) -> None:
    # entity 0, animal 1, dog 2, puppy 3; the depth of what is shared counts from 1
    assert old.similarity("puppy", "dog") == 2 * 3 / (1 + 0 + 2 * 3)
    assert old.similarity("puppy", "rex") == 2 * 3 / (1 + 1 + 2 * 3)
    assert old.similarity("dog", "toy") == 2 * 1 / (2 + 1 + 2 * 1)
    assert old.similarity("dog", "dog") == 1
    dog = old.first_synset("dog")
    assert old.wup(dog, dog) == 1


def test_the_shared_ancestor_is_the_one_whose_shortest_way_up_is_longest(old: WordNet) -> None:
    # a plush dog stands below toy and dog: its shortest way up is 2, as the dog's, and its longest 3
    assert old.similarity("plush_dog", "rag") == 2 * 4 / (0 + 1 + 2 * 4)  # the first word's synset is preferred
    assert old.similarity("rag", "plush_dog") == 2 * 3 / (2 + 1 + 2 * 3)  # else the name decides, dog before plush_dog
    assert old.similarity("toy", "rag") == 2 * 2 / (0 + 2 + 2 * 2)


def test_a_root_above_everything(old: WordNet, new: WordNet) -> None:
    # nothing joins a noun and a verb but the root, which one release adds for a verb in front and the other for either
    assert old.similarity("sit", "animal") == 2 / (1 + 2 + 2)  # one step above the farthest ancestor of each
    assert new.similarity("sit", "animal") == 2 / (1 + 2 + 2)
    assert old.similarity("animal", "sit") == 0
    assert new.similarity("animal", "sit") == 2 / (2 + 1 + 2)
    assert old.similarity("red", "loudly") == 0
    assert new.similarity("red", "loudly") == 2 / (1 + 1 + 2)
    assert old.similarity("red", "dog") == 0
    assert old.name(ROOT) == "*ROOT*"
    assert old.similarity("dog", "unheard") == 0


def test_lines_may_end_as_on_windows(tmp_path: Path, old: WordNet) -> None:
    other = WordNet(write_wordnet(tmp_path, "\r\n"))
    for one in ("puppy", "dog", "toy", "run", "scarlet"):
        for two in ("rex", "animal", "sit"):
            assert other.similarity(one, two) == old.similarity(one, two)


def test_damaged_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="index.noun"):
        WordNet(tmp_path).first_synset("dog")
    write_wordnet(tmp_path)
    (tmp_path / "data.noun").write_text("00000000 03 n 01 other 0 000 | text\n")
    with pytest.raises(DatasetError, match="no synset at byte"):
        WordNet(tmp_path).similarity("dog", "toy")
    with pytest.raises(DatasetError, match="no synset at byte"):
        WordNet(tmp_path).hypernyms(Synset("n", 10**9))
    with pytest.raises(InputError, match="nltk3.5, nltk3.10.4"):
        WordNet(tmp_path, "nltk4")
    monkeypatch.setattr(wordnet_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mmzoo\[wordnet\]"):
        WordNet()


# Lemmas and WUPS

TAGS = {"dogs": "NNS", "ran": "VBD", "loudly": "RB", "red": "JJ", "to": "TO", "puppies": "NNS"}


def tag(words: list[str]) -> list[str]:
    return [TAGS.get(word.lower(), "XX") for word in words]


def test_lemmas_without_stop_words(old: WordNet) -> None:
    lemmas = partial(
        next_qa_open.lemmatise, known=old, tag=tag, stem=lambda word: "run" if word == "runnings" else word[:2]
    )
    assert lemmas("The dogs ran loudly to puppies.") == "dog run loudly puppy ."
    assert lemmas("Runnings") == "run"  # unknown, but its stem is known
    assert lemmas("Kittens") == "kittens"  # neither is
    assert lemmas("") == ""
    assert lemmas("Not in it") == "not in"  # negations and places are answers


def test_a_word_of_no_part_is_tagged_alone(old: WordNet) -> None:
    asked = []

    def alone(words: list[str]) -> list[str]:
        asked.append(list(words))
        return ["VB"] if words == ["ran"] else ["IN"] * len(words)

    assert next_qa_open.lemmatise("dogs ran", old, alone, lambda word: word) == "dog run"
    assert asked == [["dogs", "ran"], ["dogs"], ["ran"]]


def similarity(one: str, other: str) -> float:
    table = {("cat", "dog"): 0.8, ("dog", "cat"): 0.8, ("sit", "dog"): 0.5, ("dog", "sit"): 0.0, ("a", "cat"): 0.95}
    return 1.0 if one == other else table.get((one, other), 0.0)


def test_wups_by_hand() -> None:
    wups = partial(next_qa_open.wups, similarity=similarity)
    assert wups("cat", ["dog"], alphas=[0.0]) == 0.8
    assert wups("cat", ["dog"], alphas=[0.9]) == 0.1 * 0.8
    assert wups("cat", ["dog"], alphas=[0.8]) == 0.8  # not below alpha
    assert wups("a", ["cat"], alphas=[0.9]) == 0  # 0.95 one way, nothing the other way
    assert wups("cat unheard", ["dog"], alphas=[0.0]) == 0.8  # a word like none is skipped
    assert wups("unheard", ["dog"], alphas=[0.0]) == 0
    assert wups("", ["dog"], alphas=[0.0]) == 0
    assert wups("cat sit", ["dog"], alphas=[0.0]) == 0.4  # 0.8 * 0.5 against 0.8
    assert wups("cat", ["sit", "dog"], alphas=[0.0, 0.9]) == 0.1 * 0.8
    assert wups("cat", ["dog", "dog"], alphas=[0.9, 0.0]) == 0.8


def protocol() -> next_qa_open.Protocol:
    return next_qa_open.protocol("toy", str.lower, similarity)


def test_counts_and_yes_or_no_have_to_be_equal() -> None:
    for kind in ("DC", "DB"):
        item = Item("0", "q", "dog", kind=kind, details={"second_answer": ["two"]})
        assert [protocol().judge(item, said).score for said in ("Dog", "two", "cat")] == [1, 1, 0]
    item = Item("0", "q", "dog", kind="DO", details={"second_answer": ["cat"]})
    assert protocol().judge(item, "cat").parsed == {"lemmas": "cat", "answers": ["dog", "cat"], "wups0": 1, "wups9": 1}
    assert protocol().judge(item, " ") == (0, None)


def test_groups_are_means_over_their_questions() -> None:
    said = {"CW": ["dog", "cat"], "TN": ["cat"], "TP": ["dog"], "TC": [""], "DL": ["dog"]}
    items = [
        (Item(f"{kind}{i}", "q", "dog", kind=kind), one) for kind, some in said.items() for i, one in enumerate(some)
    ]
    found = protocol().aggregate([judged(item, one, protocol()) for item, one in items])
    assert found == pytest.approx(
        {
            "CW": 90,
            "WUPS_C": 90,
            "TPN": 90,
            "TC": 0,
            "WUPS_T": 60,
            "DL": 100,
            "WUPS_D": 100,
            "WUPS": 460 / 6,
            "WUPS@0.9": 100 * (3 + 2 * 0.08) / 6,
        }
    )
    assert list(found)[-2:] == ["WUPS", "WUPS@0.9"]


def test_prompt_and_protocols() -> None:
    found = benchmark("next_qa_open")
    assert list(found.protocols) == ["published_nltk3.5", "nltk3.10.4"]
    for one in found.protocols.values():
        prompt = one.prompt(Item("0", "why did he run"))
        assert prompt == ("why did he run\nAnswer a question using a short phrase or sentence.", None, "")


def test_a_protocol_takes_wordnet_and_tagger(files: Path) -> None:
    item = Item("0", "q", "puppies", kind="DO")
    scores = {
        rules: next_qa_open.wordnet_protocol("mine", rules, files, tag, str.strip).judge(item, "the dogs").score
        for rules in ("nltk3.5", "nltk3.10.4")
    }
    assert scores == dict.fromkeys(scores, 6 / 7)


HEAD = "video,frame_count,width,height,question,answer,qid,type\n"


def test_reading_with_and_without_second_answers(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text(f"{HEAD}7,5,6,4,why,to run,0,CW\n7,5,6,4,how many,two,1,DC\n")
    (tmp_path / "add_reference_answer_test.json").write_text(json.dumps({"7": {"0": "to walk"}}))
    both, alone = next_qa_open.read(tmp_path), next_qa_open.read(tmp_path / "val.csv")
    assert both[0] == Item(
        "7_0", "why", "to run", media="7.mp4", kind="CW", cluster="7", details={"second_answer": ["to walk"]}
    )
    assert [next_qa_open.references(item) for item in both] == [["to run", "to walk"], ["two"]]
    assert [next_qa_open.references(item) for item in alone] == [["to run"], ["two"]]
    (tmp_path / "test.csv").write_text(f"{HEAD}8,5,6,4,why,to run,0,CW\n")
    assert [item.id for item in next_qa_open.read(tmp_path)] == ["8_0"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("7,5,6,4,why,to run,0,XX\n", "line 2: field 'type' 'XX'"),
        ("7,5,6,4,why,to run,0,CW\n" * 2, "video and qid 7_0 comes twice"),
        ("7,5,6,4,why,to run,0\n", "line 2: field 'type' is NoneType, not str"),
        ("", "holds no rows"),
        ('7,5,6,4,"why\n', "is no table"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "test.csv").write_text(HEAD + rows)
    with pytest.raises(DatasetError, match=said) as error:
        next_qa_open.read(tmp_path)
    assert "test.csv" in str(error.value)


# English


def test_tokens() -> None:
    said = "The man's dogs' ball isn't 3,000.5 wide; \"really?\" He can't. It is (a) 'toy'! A hot dog."
    assert tokens(said) == (
        "The man 's dogs ' ball is n't 3,000.5 wide ; `` really ? '' He ca n't . It is ( a ) ' toy ' ! A hot dog ."
    ).split(" ")
    assert tokens("a bike. a dog.") == ["a", "bike", ".", "a", "dog", "."]
    assert tokens("") == []


PLURALS = """puppies>puppy benches>bench boxes>box glasses>glass brushes>brush buses>bus knives>knife women>woman
policemen>policeman children>child people>person geese>goose sheep>sheep scissors>scissors ties>tie cookies>cookie
horses>horse vases>vase couches>couch canoes>canoe potatoes>potato shoes>shoe gloves>glove stoves>stove skis>ski
giraffes>giraffe movies>movie trolleys>trolley men>man dogs'>dog's is>is bus>bu glass>glas his>hi plays>play flies>fly
toothbrushes>toothbrush sandwiches>sandwich pies>pie calves>calf headaches>headache beaches>beach axes>axe dog>dog
.>. '>'s 's>'"""


@pytest.mark.parametrize("pair", PLURALS.split())
def test_singulars(pair: str) -> None:
    plural, _, one = pair.partition(">")
    assert singular(plural) == one


@given(st.text() | st.text("dogs'\".,;:()?! n\n"))
def test_no_text_makes_words_raise(text: str) -> None:
    for word in tokens(text):
        assert word.strip() == word != ""
        assert singular(word) or word == "s"


@given(st.text("catdogsi ,.'\"\n") | st.text())
def test_no_response_makes_wups_raise(response: str) -> None:
    verdict = protocol().judge(Item("0", "q", "dog", kind="DO", details={"second_answer": ["cat sit"]}), response)
    assert 0 <= verdict.score <= 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.sys.modules, "nltk", None)
    monkeypatch.setitem(importlib.sys.modules, "nltk.stem.porter", None)
    english._porter.cache_clear()
    for ask in (lambda: english.nltk_tags(["dog"]), lambda: english.nltk_stem("dogs")):
        with pytest.raises(MissingExtra, match=r"mmzoo\[wordnet\]"):
            ask()


@pytest.mark.slow
def test_the_real_wordnet_reproduces_every_similarity_and_lemma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs the extra `wordnet`. nltk's tagger has its data elsewhere, so tags are given by hand."""
    try:
        packaged_files()
        english.nltk_stem("dogs")
    except MissingExtra as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(ROOT_FOLDER / "scripts")
    cases, runner = (importlib.import_module(name) for name in ("parity_cases", "parity_open"))
    case = cases.Case(ROOT_FOLDER / "tests" / "data" / "parity" / "eval" / "nextqa_open")
    found = list(runner.wups(case))
    assert all(one.passed for one in found)
    assert sum("similarities" in one.name for one in found) == 2
    given_tags = """licking:VBG laughed:VBD loudly:RB smiled:VBD happily:RB cried:VBD sat:VBD crying:VBG drank:VBD
    wants:VBZ shows:VBZ get:VB lay:VB show:VB catch:VB sit:VB down:RP some:DT"""
    by_word = dict(pair.split(":") for pair in given_tags.split())
    monkeypatch.setattr(runner, "tagger", lambda: True)
    monkeypatch.setattr(
        runner.next_qa_open,
        "lemmatise",
        partial(next_qa_open.lemmatise, tag=lambda words: [by_word.get(word, "NN") for word in words]),
    )
    lemmas = [one for one in runner.wups(case) if one.name.endswith("lemmas")]
    assert [one.passed for one in lemmas] == [True, True]
