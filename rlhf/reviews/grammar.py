"""A probabilistic grammar of short restaurant reviews: writes them in two styles, and parses them again.

A prompt names a subject, and a response is one to three opinion sentences and, often, a closing one:

    prompt    about music at greek grill :
    response  the songs at this greek grill were very catchy . sadly , i disliked the loud band . it is worth a visit .

Three rules reach across a sentence, and are what a small model finds hard: "was" or "were" follows the noun's
number, an adjective belongs to the noun's aspect or fits all, and "and" joins opinions of one sign where "but" joins
opposite ones. `parse` reports the rules that a sentence breaks; the gold reward is built on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

# aspect -> (singular nouns, plural nouns)
NOUNS_BY_ASPECT = {
    "food": ("soup steak salad pizza", "noodles fries desserts"),
    "service": ("waiter host manager chef", "servers cooks greetings"),
    "drinks": ("wine coffee beer lemonade", "cocktails juices teas"),
    "decor": ("carpet lighting room terrace", "chairs paintings curtains"),
    "price": ("bill menu deal fee", "discounts portions specials"),
    "music": ("band singer playlist piano", "songs speakers drums"),
}
# aspect -> adjectives of value 2, of 1, of -1 and of -2
ADJECTIVES_BY_ASPECT = {
    "food": ("delicious juicy", "tasty fresh crunchy", "bland cold salty", "rotten burnt"),
    "service": ("charming attentive", "friendly polite quick", "slow distant careless", "rude hostile"),
    "drinks": ("refreshing divine", "smooth chilled fruity", "watery weak flat", "sour undrinkable"),
    "decor": ("stunning elegant", "cosy bright stylish", "dark dusty shabby", "filthy hideous"),
    "price": ("unbeatable generous", "fair cheap modest", "steep stingy confusing", "shocking absurd"),
    "music": ("enchanting uplifting", "lively soft catchy", "loud dull repetitive", "deafening painful"),
}
SHARED_ADJECTIVES = {
    "wonderful": 2.0, "perfect": 2.0, "great": 1.5, "good": 1.0, "nice": 1.0, "decent": 0.5,
    "average": -0.5, "bad": -1.0, "poor": -1.0, "mediocre": -1.5, "terrible": -2.0, "awful": -2.0,
}  # fmt: skip
VERBS = {
    "loved": 2.0, "adored": 2.0, "enjoyed": 1.0, "liked": 1.0, "tried": 0.0, "noticed": 0.0,
    "disliked": -1.0, "regretted": -1.0, "hated": -2.0, "loathed": -2.0,
}  # fmt: skip
ADVERBS = {"slightly": 0.5, "fairly": 0.75, "quite": 1.0, "really": 1.25, "very": 1.5}
NEGATION = -0.5  # "not great" is mildly bad, "not bad" mildly good
# opener -> sign of the sentence that may follow it, 0 for either
OPENERS = {
    "honestly": 0, "today": 0, "overall": 0, "yesterday": 0, "again": 0,
    "luckily": 1, "happily": 1, "sadly": -1, "unfortunately": -1,
}  # fmt: skip
CLOSINGS = {
    "it is worth a visit .": 1.0, "i will come back .": 1.0, "we will come back .": 1.0, "highly recommended .": 1.0,
    "five stars .": 2.0, "it is not worth a visit .": -1.0, "i will never come back .": -1.0,
    "we will never come back .": -1.0, "not recommended .": -1.0, "one star .": -2.0,
}  # fmt: skip
CUISINES = ("french", "italian", "greek", "indian", "thai", "mexican")
PLACES = ("bistro", "diner", "grill", "cafe")
ASPECTS = tuple(NOUNS_BY_ASPECT)

# Words in capitals are slots; a slot in brackets may be left out.
TEMPLATES = {
    "plain": "the NOUN BE [ADVERB] ADJECTIVE .",
    "pair": "the NOUN BE ADJECTIVE CONJUNCTION ADJECTIVE .",
    "negated": "the NOUN BE not ADJECTIVE .",
    "verb": "PERSON VERB the [ADJECTIVE] NOUN .",
    "found": "PERSON found the NOUN [ADVERB] ADJECTIVE .",
    "place": "the NOUN at this CUISINE PLACE BE [ADVERB] ADJECTIVE .",
    "two": "the NOUN BE ADJECTIVE CONJUNCTION the NOUN BE ADJECTIVE .",
}


@dataclass(frozen=True)
class Noun:
    aspect: str
    plural: bool


@dataclass(frozen=True)
class Adjective:
    aspect: str  # "any" fits every noun
    value: float


NOUNS = {
    noun: Noun(aspect, plural)
    for aspect, (singulars, plurals) in NOUNS_BY_ASPECT.items()
    for plural, nouns in ((False, singulars), (True, plurals))
    for noun in nouns.split()
}
ADJECTIVES = {
    adjective: Adjective(aspect, value)
    for aspect, graded in ADJECTIVES_BY_ASPECT.items()
    for value, adjectives in zip((2.0, 1.0, -1.0, -2.0), graded, strict=True)
    for adjective in adjectives.split()
} | {adjective: Adjective("any", value) for adjective, value in SHARED_ADJECTIVES.items()}
SLOTS: dict[str, tuple[str, ...]] = {
    "NOUN": tuple(NOUNS),
    "BE": ("was", "were"),
    "ADVERB": tuple(ADVERBS),
    "ADJECTIVE": tuple(ADJECTIVES),
    "CONJUNCTION": ("and", "but"),
    "PERSON": ("i", "we"),
    "VERB": tuple(VERBS),
    "CUISINE": CUISINES,
    "PLACE": PLACES,
}
SLOT_OF = {word: slot for slot, words in SLOTS.items() for word in words}  # no word is in two classes
CONTENT_SLOTS = ("NOUN", "ADVERB", "ADJECTIVE", "VERB")


def vocabulary() -> list[str]:
    """Every word of prompts and reviews, once, in a fixed order."""
    literals = " ".join((*TEMPLATES.values(), *CLOSINGS)).replace("[", "").replace("]", "").split()
    words = [":", ",", "about", "at", *ASPECTS, *OPENERS, *(word for word in literals if word not in SLOTS)]
    return list(dict.fromkeys(words + [word for slot in SLOTS.values() for word in slot]))


@dataclass(frozen=True)
class Subject:
    """What a prompt asks about."""

    aspect: str
    cuisine: str
    place: str

    def prompt(self) -> str:
        return f"about {self.aspect} at {self.cuisine} {self.place} :"


PROMPTS = tuple(Subject(*names).prompt() for names in product(ASPECTS, CUISINES, PLACES))
_SUBJECTS = {Subject(*names).prompt(): Subject(*names) for names in product(ASPECTS, CUISINES, PLACES)}


def parse_prompt(prompt: str) -> Subject | None:
    """The subject of a prompt; None for a text that is not one of the 144 prompts."""
    return _SUBJECTS.get(" ".join(prompt.split()))


@dataclass(frozen=True)
class Sentence:
    """One sentence of a review, as `parse` reads it."""

    words: tuple[str, ...]
    template: str  # a key of TEMPLATES, "closing" or "unparsed"
    value: float = 0.0  # the opinion: mean over its opinion words, 0 where unparsed
    nouns: tuple[str, ...] = ()
    place: tuple[str, str] | None = None  # (cuisine, place), where the sentence names them
    content: tuple[str, ...] = ()  # what counts as repeated when it comes again
    errors: tuple[str, ...] = ()  # rules broken: "number", "fit", "conjunction", "verb", "opener"


def parse_review(text: str) -> list[Sentence]:
    """The sentences of a review; unparsed are a last one without its full stop, and a closing that is not the last."""
    groups: list[list[str]] = [[]]
    for word in text.split():
        groups[-1].append(word)
        if word == ".":
            groups.append([])
    sentences = [parse(tuple(group)) for group in groups if group]
    return [_unparsed(s.words) if s.template == "closing" else s for s in sentences[:-1]] + sentences[-1:]


def _unparsed(words: tuple[str, ...]) -> Sentence:
    return Sentence(words, "unparsed", content=words)


@lru_cache(maxsize=100_000)
def parse(words: tuple[str, ...]) -> Sentence:
    """Reads one sentence, full stop included; an ungrammatical one comes back with template "unparsed"."""
    text = " ".join(words)
    if text in CLOSINGS:
        return Sentence(words, "closing", value=CLOSINGS[text], content=(text,))
    opener = words[0] if len(words) > 1 and words[0] in OPENERS and words[1] == "," else None
    body = words[2:] if opener else words
    for name, template in TEMPLATES.items():
        slots = _match(template, body)
        if slots is not None:
            return _read(words, name, slots, opener)
    return _unparsed(words)


def _match(template: str, words: tuple[str, ...]) -> list[tuple[str, str]] | None:
    """The (slot, word) pairs of a sentence that follows the template, else None.

    Reading on without looking back is enough: word classes are disjoint, so no choice is ever open.
    """
    slots: list[tuple[str, str]] = []
    position = 0
    for element in template.split():
        word = words[position] if position < len(words) else ""
        slot = element.strip("[]")
        if slot in SLOTS and SLOT_OF.get(word) == slot:
            slots.append((slot, word))
        elif element.startswith("["):
            continue
        elif word != element:
            return None
        position += 1
    return slots if position == len(words) else None


def _read(words: tuple[str, ...], name: str, slots: list[tuple[str, str]], opener: str | None) -> Sentence:
    """Value and broken rules of a sentence that follows template `name`."""

    def filled(slot: str) -> list[str]:
        return [word for filled_slot, word in slots if filled_slot == slot]

    nouns, adjectives = filled("NOUN"), filled("ADJECTIVE")
    factor = (NEGATION if name == "negated" else 1.0) * (ADVERBS[filled("ADVERB")[0]] if filled("ADVERB") else 1.0)
    verb_values = [VERBS[verb] for verb in filled("VERB")]
    adjective_values = [factor * ADJECTIVES[adjective].value for adjective in adjectives]
    values = verb_values + adjective_values
    value = sum(values) / len(values)

    nouns_described = nouns if len(nouns) == len(adjectives) else nouns[:1] * len(adjectives)
    joined_by = filled("CONJUNCTION")
    broken = {
        # In "found" and "verb" sentences there is no BE, and nothing to agree.
        "number": any((be == "were") != NOUNS[noun].plural for noun, be in zip(nouns, filled("BE"), strict=False)),
        "fit": any(
            ADJECTIVES[adjective].aspect not in ("any", NOUNS[noun].aspect)
            for noun, adjective in zip(nouns_described, adjectives, strict=True)
        ),
        "conjunction": bool(joined_by) and (joined_by[0] == "and") != (adjective_values[0] * adjective_values[-1] > 0),
        "verb": any(verb * adjective < 0 for verb, adjective in zip(verb_values, adjective_values, strict=False)),
        "opener": opener is not None and OPENERS[opener] * value < 0,
    }
    place = (filled("CUISINE")[0], filled("PLACE")[0]) if name == "place" else None
    content = [word for slot, word in slots if slot in CONTENT_SLOTS]
    return Sentence(
        words,
        name,
        value=value,
        nouns=tuple(nouns),
        place=place,
        content=tuple([opener, *content] if opener else content),
        errors=tuple(rule for rule, is_broken in broken.items() if is_broken),
    )


@dataclass(frozen=True)
class Style:
    """The probabilities that make one distribution of reviews."""

    on_subject: float  # a sentence is about the prompt's aspect; a named place is the prompt's
    coherent: float  # a sentence, or the closing, shares the sign of the review's mood
    closing: float  # the review ends with a closing sentence
    opener: float  # a sentence has an opener
    corrupted: float  # one word of a sentence is dropped, doubled, or replaced within its class
    varied: bool  # words already used in the review are avoided
    templates: tuple[float, ...]  # relative frequency of each of TEMPLATES
    num_sentences: tuple[float, ...]  # relative frequency of 1, 2, 3 opinion sentences
    num_words: tuple[int, int]  # shortest and longest review, punctuation included


BASE = Style(
    on_subject=0.5,
    coherent=0.6,
    closing=0.3,
    opener=0.2,
    corrupted=0.06,
    varied=False,
    templates=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    num_sentences=(1.0, 2.0, 2.0),
    num_words=(6, 26),
)
SFT = Style(
    on_subject=0.88,
    coherent=0.8,
    closing=0.8,
    opener=0.5,
    corrupted=0.03,
    varied=True,
    templates=(1.0, 1.5, 0.7, 1.0, 0.8, 1.5, 1.5),
    num_sentences=(0.3, 2.0, 2.0),
    num_words=(10, 26),
)


def generate(rng: random.Random, prompt: str, style: Style) -> str:
    """One review for the prompt, drawn from the style; the same state of `rng` gives the same review.

    Raises ValueError for a text that is not one of PROMPTS.
    """
    subject = parse_prompt(prompt)
    if subject is None:
        raise ValueError(f"not a prompt of the reviews task: {prompt!r}; expected one of PROMPTS, like {PROMPTS[0]!r}")
    shortest, longest = style.num_words
    while True:
        words = _review(rng, subject, style)
        if shortest <= len(words) <= longest:
            return " ".join(words)


def _review(rng: random.Random, subject: Subject, style: Style) -> list[str]:
    mood = rng.choice((-1, 1))
    used: set[str] = set()
    words: list[str] = []
    for _ in range(rng.choices((1, 2, 3), style.num_sentences)[0]):
        sign = mood if rng.random() < style.coherent else -mood
        sentence = _opinion(rng, subject, sign, used if style.varied else set(), style)
        if rng.random() < style.opener:
            value = parse(tuple(sentence)).value
            sentence = [rng.choice([opener for opener, s in OPENERS.items() if s * value >= 0]), ",", *sentence]
        words += _corrupt(rng, sentence) if rng.random() < style.corrupted else sentence
    if rng.random() < style.closing:
        sign = mood if rng.random() < style.coherent else -mood
        words += rng.choice([closing for closing, value in CLOSINGS.items() if sign * value > 0]).split()
    return words


def _opinion(rng: random.Random, subject: Subject, sign: int, used: set[str], style: Style) -> list[str]:
    """A correct opinion sentence of the given sign; adds the words it draws to `used`."""
    template = rng.choices(tuple(TEMPLATES.values()), style.templates)[0]
    aspect = subject.aspect if rng.random() < style.on_subject else _other(rng, ASPECTS, subject.aspect)
    cuisine, place = subject.cuisine, subject.place
    if rng.random() >= style.on_subject:
        cuisine, place = _other(rng, CUISINES, cuisine), rng.choice(PLACES)

    words: list[str] = []
    noun = ""
    for element in template.split():
        if element.startswith("[") and rng.random() < 0.5:
            continue
        match element.strip("[]"):
            case "NOUN":
                noun = word = _fresh(rng, [name for name, entry in NOUNS.items() if entry.aspect == aspect], used)
            case "BE":
                word = "were" if NOUNS[noun].plural else "was"
            case "ADJECTIVE":
                fitting = (name for name, entry in ADJECTIVES.items() if entry.aspect in (aspect, "any"))
                word = _fresh(rng, [name for name in fitting if ADJECTIVES[name].value * sign > 0], used)
            case "VERB":
                word = _fresh(rng, [verb for verb, value in VERBS.items() if value * sign >= 0], used)
            case "CUISINE":
                word = cuisine
            case "PLACE":
                word = place
            case slot if slot in SLOTS:
                word = rng.choice(SLOTS[slot])
            case literal:
                word = literal
        if word in ("not", "but"):
            sign = -sign
        words.append(word)
    return words


def _other(rng: random.Random, names: tuple[str, ...], name: str) -> str:
    return rng.choice([other for other in names if other != name])


def _fresh(rng: random.Random, candidates: list[str], used: set[str]) -> str:
    """A candidate not used before, where there is one."""
    word = rng.choice([candidate for candidate in candidates if candidate not in used] or candidates)
    used.add(word)
    return word


def _corrupt(rng: random.Random, sentence: list[str]) -> list[str]:
    """The sentence with one word dropped, doubled, or replaced by another of its class."""
    position = rng.randrange(len(sentence) - 1)  # the full stop stays
    kind = rng.choice(("drop", "double", "replace"))
    replaceable = [i for i, word in enumerate(sentence) if word in SLOT_OF]
    if kind == "replace" and replaceable:
        position = rng.choice(replaceable)
        new = [_other(rng, SLOTS[SLOT_OF[sentence[position]]], sentence[position])]
    else:
        new = [sentence[position]] * 2 if kind == "double" else []
    return sentence[:position] + new + sentence[position + 1 :]


def corrupt(rng: random.Random, review: str) -> str:
    """The review with one word of one sentence dropped, doubled, or replaced by another of its class."""
    sentences = [list(sentence.words) for sentence in parse_review(review)]
    index = rng.randrange(len(sentences))
    sentences[index] = _corrupt(rng, sentences[index])
    return " ".join(word for sentence in sentences for word in sentence)


def split_prompts() -> tuple[list[str], list[str]]:
    """(108 training prompts, 36 held-out prompts): every aspect meets every cuisine in just one held-out prompt.

    The split is the same for every seed, so that held-out scores of different seeds compare.
    """
    held_out = {
        Subject(aspect, cuisine, PLACES[(i + j) % len(PLACES)]).prompt()
        for i, aspect in enumerate(ASPECTS)
        for j, cuisine in enumerate(CUISINES)
    }
    return [prompt for prompt in PROMPTS if prompt not in held_out], sorted(held_out, key=PROMPTS.index)


def generate_many(rng: random.Random, prompts: Iterable[str], count: int, style: Style) -> list[tuple[str, str]]:
    """`count` (prompt, review) pairs, each for a prompt drawn at random."""
    pool = list(prompts)
    return [(prompt, generate(rng, prompt, style)) for prompt in (rng.choice(pool) for _ in range(count))]
