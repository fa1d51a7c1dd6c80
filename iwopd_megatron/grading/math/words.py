"""Answers that are words (yes, none, does not exist) or a choice's letter.

`yes` and `true` are different words, and so are `none` and `does not exist`; `none`, `no solution`
and the empty set are one. The first word decides where it is yes, no, true or false and punctuation
follows. A choice may carry its content: `(E) 12` answers both `E` and `12`.
"""

from __future__ import annotations

import re

SAME = {  # one name for each meaning; the other spellings beside it
    "yes": (),
    "no": (),
    "true": ("correct",),
    "false": ("incorrect", "not true"),
    "none": (
        "no solution",
        "no solutions",
        "no real solution",
        "no real solutions",
        "no such values",
        "there is no solution",
        "there are no solutions",
        "no integer solutions",
        "empty set",
        "the empty set",
        "empty",
        "has no solution",
        "there are none",
        "no solution exists",
        "no solutions exist",
        "no integer solution",
        "no roots",
        "no real roots",
    ),
    "does not exist": (
        "dne",
        "doesn't exist",
        "doesnt exist",
        "the limit does not exist",
        "limit does not exist",
        "it does not exist",
        "not exist",
        "d n e",
        "no limit",
        "the limit doesn't exist",
    ),
    "infinitely many": (
        "infinitely many solutions",
        "infinite solutions",
        "infinite number of solutions",
        "infinitely many solution",
        "there are infinitely many",
    ),
    "undefined": ("not defined", "is undefined"),
    "converges": (
        "convergent",
        "converge",
        "it converges",
        "the series converges",
        "is convergent",
    ),
    "diverges": ("divergent", "diverge", "it diverges", "the series diverges", "is divergent"),
    "infinity": ("infinite", "positive infinity", "+infinity", "diverges to infinity"),
    "impossible": ("not possible", "it is impossible"),
    "all real numbers": (
        "all reals",
        "all real",
        "every real number",
        "any real number",
        "real numbers",
        "the set of all real numbers",
    ),
}
MEANING = {spelling: name for name, group in SAME.items() for spelling in (name, *group)}
LATEX = {"none": r"\emptyset", "infinity": r"\infty", "all real numbers": r"(-\infty,\infty)"}
_UP_TO_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {name: value for value, name in enumerate(_UP_TO_TWELVE)}

LEAD = re.compile(r"(yes|no|true|false)\s*[,.;:!-]\s*\w.*", re.DOTALL)
CHOICE = re.compile(
    r"(?:\\text\s*\{\s*)?(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:?\s*)?"
    r"(?:\(\s*(?:\\text\s*\{)?\s*([A-J])\s*\}?\s*\)|([A-J])\s*[).:]|([A-J])(?=\s*\}?$))"
    r"[.:]?\s*(\}?)\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
NUMBER = re.compile(r"-?\d|\\(?:frac|sqrt|text)")
OPERATOR = re.compile(r"[-+*/=^<>_,(]|\\(?:cdot|times|cup|cap|le|ge|ne|in|or)\b|or\b")


def word(text: str) -> str | None:
    """Return the meaning of an answer in words: a key of SAME, or its letters if it is unknown.

    None for an answer that is no words.
    """
    if re.search(r"[\d=<>^_+*/()\[\]]|\\(?!text\b|infty|emptyset)", text):
        return None
    letters = text.replace(r"\emptyset", " none ").replace(r"\infty", " infinity ")
    letters = re.sub(r"\\text\s*|[{}$]", " ", letters).lower()
    letters = re.sub(r"\s+", " ", letters).strip(" .,;:!")
    if lead := LEAD.fullmatch(letters):
        return lead[1]
    return MEANING.get(letters, letters) if re.search("[a-z]", letters) else None


def is_word(text: str) -> bool:
    """Return whether a text must be words: set as text, known here, or several long ones."""
    letters = word(text)
    if letters is None or re.fullmatch(r"\\text\s*\{\s*\w\s*\}|-?\s*\\infty|\\emptyset", text):
        return False
    return (
        text.startswith(r"\text")
        or letters in SAME
        or bool(re.search("[a-z]{3,} [a-z]{2,}", letters))
    )


def as_latex(text: str) -> str:
    """Return words that have a symbol (infinity, none, all reals, small numbers) as that symbol."""
    sign = "-" if re.match(r"-|\\text\s*\{\s*(?:-|minus|negative)", text) else ""
    letters = word(
        re.sub(r"minus |negative |^\s*-|\{\s*-", lambda m: "{" if "{" in m[0] else "", text)
    )
    if letters in NUMBERS:
        return f"{sign}{NUMBERS[letters]}"
    return sign + LATEX[letters] if letters in LATEX else text


def choice(text: str) -> tuple[str, str]:
    """Return (letter of a choice in capitals or "", what stands beside it)."""
    match = CHOICE.fullmatch(text)
    if match is None:
        return "", text
    letter = match[1] or match[2] or match[3]
    rest = match[5]
    if match[4] == "" and r"\text" in text[: match.start(5)] and rest.endswith("}"):
        rest = rf"\text{{{rest}"  # the brace of \text{A) 17} is still open
    # a small letter may be a factor, or the imaginary unit
    is_symbol = letter.islower() and not NUMBER.match(rest) if rest else letter in "ei"
    if OPERATOR.match(rest) or is_symbol:
        return "", text
    return letter.upper(), rest.strip()
