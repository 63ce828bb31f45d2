"""The VQA normaliser: punctuation, number words, articles, contractions.

After VQAEval in LAVIS (BSD-3), with VLMEvalKit's variant. Its oddities are kept, since scores depend on them: a flag
stands where a count belongs, so at most 32 periods are removed, and in the "loose" variant a mistyped pattern removes a
period after a digit too.
"""

from __future__ import annotations

import re

_REMOVED = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = {"loose": re.compile(r"\.(?!\d)"), "strict": re.compile(r"(?<!\d)\.(?!\d)")}
_PERIODS_REMOVED = 32
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}

_CONTRACTIONS = dict(
    pair.split(">")
    for pair in """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't
havent>haven't hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's Id've>I'd've
I'dve>I'd've Im>I'm Ive>I've isnt>isn't itd>it'd itd've>it'd've it'dve>it'd've itll>it'll let's>let's maam>ma'am
mightnt>mightn't mightnt've>mightn't've mightn'tve>mightn't've mightve>might've mustnt>mustn't mustve>must've
neednt>needn't notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at
shant>shan't shed've>she'd've she'dve>she'd've she's>she's shouldve>should've shouldnt>shouldn't
shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've
somebody'dve>somebody'd've somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've
someone'dve>someone'd've someonell>someone'll someones>someone's somethingd>something'd somethingd've>something'd've
something'dve>something'd've somethingll>something'll thats>that's thered>there'd thered've>there'd've
there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've
theyll>they'll theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've
werent>weren't whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd wheres>where's
whereve>where've whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll
whyre>why're whys>why's wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've
yall>y'all yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've
youd>you'd youd've>you'd've you'dve>you'd've youll>you'll youre>you're youve>you've
""".split()
)


def without_punctuation(text: str, periods: str = "loose") -> str:
    """The text without punctuation.

    A character is deleted if it stands beside a space anywhere in the text, or if the text holds a number with a comma;
    otherwise it becomes a space.

    Args:
        text: as it is.
        periods: "loose" (LAVIS, lmms-eval) keeps a period only before a digit; "strict" (VLMEvalKit) also after one.
    """
    cleaned = text
    for character in _REMOVED:
        glued = f"{character} " in text or f" {character}" in text or _COMMA_IN_NUMBER.search(text)
        cleaned = cleaned.replace(character, "" if glued else " ")
    return _PERIOD[periods].sub("", cleaned, count=_PERIODS_REMOVED)


def normalised(text: str) -> str:
    """An answer as VQA accuracy compares it: no punctuation, lower case, digits, no articles, contractions restored."""
    words = [_DIGITS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
