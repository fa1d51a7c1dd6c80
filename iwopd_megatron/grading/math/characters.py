"""Unicode mathematics as LaTeX: every rule of `normalise` sees one alphabet."""

from __future__ import annotations

import re
import unicodedata

# one character, one spelling
PLAIN = {
    # blanks of every width, no width at all, and direction marks
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006", " "),
    **dict.fromkeys("\u2007\u2008\u2009\u200a", " "),
    **dict.fromkeys("\u202f\u205f\u3000\t\r\n", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u2061\u2062", ""),
    # every dash before a number is a minus
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63", "-"),
    **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"), **dict.fromkeys("\u201c\u201d", '"'),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ",
    "÷": r"\div ", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≡": r"\equiv ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "⌀": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⟨": r"\langle ",
    "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C",
    "…": r"\ldots ", "⋯": r"\ldots ", "∧": r"\land ", "∨": r"\lor ", "∣": r"\mid ",
    "∴": "", "✓": "", "✔": "", "■": "", "□": "", "∎": "", "。": ".", "、": ",", "｡": ".",
    "【": "[", "】": "]", "≅": r"\cong ", "∼": r"\sim ", "→": r"\to ", "ⅈ": "i", "ⅇ": "e",
}  # fmt: skip
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
    "sigma sigma tau upsilon phi chi psi omega"
).split()
GREEK_LETTERS = {chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(GREEK)} | {
    chr(0x391 + i): rf"\{name.capitalize()} " for i, name in enumerate(GREEK) if i != 17
}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
FRACTION = re.compile("[¼-¾⅐-⅞]")
# a raised figure before a root is its degree, unless it is the power of what stands before it
RADICAND = re.compile(
    r"(?:(?<![\w)}\]])([²³⁴⁵⁶⁷⁸⁹]))?([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zA-Zπ]))?"
)


def latex_of(text: str) -> str:
    """Return the text with LaTeX commands and ASCII in place of mathematical Unicode."""
    text = "".join(_narrow(character) for character in text)
    text = FRACTION.sub(_fraction, text)
    text = RADICAND.sub(_root, text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱ]+", lambda m: f"^{{{m[0].translate(RAISED)}}}", text)
    text = re.sub("[₀-₎]+", lambda m: f"_{{{m[0].translate(LOWERED)}}}", text)
    return "".join(PLAIN.get(c, GREEK_LETTERS.get(c, c)) for c in text)


def _narrow(character: str) -> str:
    """Return a full-width, bold or italic character as a plain one, another as it is."""
    code = ord(character)
    if 0xFF01 <= code <= 0xFFE6 or 0x1D400 <= code <= 0x1D7FF:
        return unicodedata.normalize("NFKC", character)
    return character


def _fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom or 1}}}"


def _root(match: re.Match[str]) -> str:
    degree, sign, *groups = match.groups()
    under = next((group for group in groups if group is not None), None)
    root = rf"\sqrt[{degree.translate(RAISED)}]" if degree else ROOTS[sign]
    return root + (f"{{{under}}}" if under is not None else "")
