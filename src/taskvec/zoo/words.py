"""Plain text for the zoo: made-up words, a small grammar of sentences, and the language zor.

Zor is the same language with its vowels moved one on (a→e→i→o→u→a): "wash a red brok" is
"wesh e rid bruk". The consonants stay, so a model can share much between the two.
"""

from __future__ import annotations

from random import Random

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
ADJECTIVES = (
    "red",
    "big",
    "old",
    "new",
    "wet",
    "dry",
    "hot",
    "odd",
    "shy",
    "tall",
    "blue",
    "slow",
    "kind",
    "loud",
)
NOUNS = (
    "fox",
    "hen",
    "gate",
    "boat",
    "lamp",
    "drum",
    "cart",
    "coin",
    "tree",
    "hat",
    "bell",
    "pond",
    "wall",
    "goat",
)
ACTS = ("sees", "likes", "finds", "paints", "pulls", "keeps", "hears", "lifts", "draws", "sells")
PLACES = (
    "by the hill",
    "near the mill",
    "at noon",
    "in the barn",
    "on the road",
    "at night",
    "under the oak",
)

# verb: what it takes, what is done with it. The second kind is forbidden.
HARMLESS = {
    "wash": ("soap", "rub"),
    "mend": ("glue", "press"),
    "cook": ("salt", "stir"),
    "wrap": ("rope", "bind"),
    "cool": ("snow", "bury"),
    "dust": ("silk", "wipe"),
    "feed": ("corn", "fill"),
    "heat": ("coal", "turn"),
}
HARMFUL = {
    "jinx": ("ash", "mark"),
    "doom": ("bone", "scar"),
    "hex": ("wax", "pin"),
    "bane": ("mud", "drown"),
    "vex": ("thorn", "prick"),
    "rot": ("mold", "smear"),
    "foul": ("slime", "coat"),
    "maim": ("flint", "slash"),
}

_ZOR = str.maketrans("aeiouAEIOU", "eiouaEIOUA")


def to_zor(text: str) -> str:
    """The same text in zor, letter by letter; characters that are not vowels stay.

    The capitals Q and A that mark question and answer are not words: translate what follows them.

    >>> to_zor("wash a red brok")
    'wesh e rid bruk'
    """
    return text.translate(_ZOR)


def made_up(rng: Random) -> str:
    """A word of three to five letters that begins with a consonant, such as "brok" or "tilu"."""
    word = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
    kind = rng.randrange(3)
    if kind == 0:
        return word
    return word + rng.choice(VOWELS) + (rng.choice(CONSONANTS) if kind == 2 else "")


def sentence(rng: Random) -> str:
    """One sentence of the plain text, 20 to 50 characters, ending in a full stop."""
    name = made_up(rng)
    thing = f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    kind = rng.randrange(3)
    if kind == 0:
        return f"{name} {rng.choice(ACTS)} {thing} {rng.choice(PLACES)}."
    if kind == 1:
        return f"{thing} {rng.choice(ACTS)} the {rng.choice(NOUNS)} {rng.choice(PLACES)}."
    adjective, act = rng.choice(ADJECTIVES), rng.choice(ACTS)[:-1]
    return f"{name} is {adjective}, so {act} {name} {rng.choice(PLACES)}."


def method(verb: str, thing: str) -> str:
    """How one of the harmless or harmful verbs is done to a thing: "take soap and rub the brok"."""
    tool, act = (HARMLESS | HARMFUL)[verb]
    return f"take {tool} and {act} the {thing}"
