"""One normaliser before math-verify: an answer in one spelling, whatever it was written in.

SPACES, DECORATION and NAMES are applied from top to bottom, each rule with its reason above it;
what needs more than a pattern is in `characters` (Unicode), `layout` (environments, fonts) and
`numbers` (spellings of numbers). A rule changes how an answer is written, never what it says: where
a spelling has two readings, both answers decide (`compare`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from iwopd_megatron.grading.math.characters import latex_of
from iwopd_megatron.grading.math.layout import strip_braces, unwrap
from iwopd_megatron.grading.math.numbers import plain_numbers

# as `re.sub` takes it
Replacement = str | Callable[[re.Match[str]], str]


class Rule(NamedTuple):
    """A pattern and what each of its matches is replaced by."""

    pattern: re.Pattern[str]
    replacement: Replacement


def _rules(*pairs: tuple[str, Replacement]) -> list[Rule]:
    return [Rule(re.compile(pattern), replacement) for pattern, replacement in pairs]


SPACES = _rules(
    # a dollar sign opens mathematics; the currency is written \$
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " "),
    # braces around a space hold nothing
    (r"\{\s*(\\[,;:! ])\s*\}", r"\1"),
    # negative space is no space
    (r"(?<!\\)\\!|\\(?:relax|null|allowbreak|nobreak)(?![a-zA-Z])", ""),
    # a new row of a matrix may be set apart
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\s*\]", r"\\\\"),
    # all spaces are one; behind a backslash that ends a row they are none
    (
        r"(?<!\\)\\[,;:> ]|(?<!\\)~"
        r"|\\(?:q?quad|enspace|thinspace|medspace|thickspace|space)(?![a-zA-Z])",
        " ",
    ),
    (
        r"\\[hv]space\*?\s*\{[^{}]*\}|\\[hv]?phantom\s*\{[^{}]*\}|\\(?:tag|label)\*?\s*\{[^{}]*\}",
        " ",
    ),
    (r"\s+", " "),
)
DECORATION = _rules(
    # two stars between operands are Python's power; elsewhere they are Markdown's bold
    (r"(?<=[\w)}])\*\*(?=[\w({-])(?!\w[^*]*\*\*)", "^"),
    (r"\*\*|(?<!\w)__|__(?!\w)|`", ""),
    (r"^\*([^*]+)\*$", r"\1"),
    # quotation marks around everything
    (r"""^\s*(["'])([^"']*)\1\s*$""", r"\2"),
    # brackets have a size, which says nothing
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)\s*(?![a-zA-Z])\.?(?=$|[^\d])", ""),
    # marks after an answer
    (r"\\(?:checkmark|blacksquare|qed|Box|therefore|because|implies)(?![a-zA-Z])|\\hfill", ""),
    # a full stop or comma that ends the sentence, also in text; an ellipsis is not one
    (r"\\text\s*\{\s*[.,;:]*\s*\}", " "),
    (r"(?<![\\.])(?:[,;:\s]|\.(?!\.))+$", ""),
    # a number set as text is a number
    (r"\\text\s*\{\s*([-+]?[\d.,/:%\\$\s]*\d[\d.,/:%\\$\s]*)\s*\}", r"\1"),
    # braces around a lone symbol or number, which a font leaves
    (r"(?:^|(?<=[=+\-(,]))\s*\{(\w+)\}", r"\1"),
    (r"^\s*(?:=|\\approx(?![a-zA-Z])|\\sim(?![a-zA-Z])|\\to(?![a-zA-Z])|:)\s*", ""),
)
NAMES = _rules(
    # one name for each operator, however it is spelled
    (
        r"\\operatorname\*?\s*\{\s*(arc(?:sin|cos|tan)|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|lg"
        r"|exp"
        r"|min|max|gcd|det|arg)\s*\}",
        r"\\\1 ",
    ),
    (
        r"\\(?:text|operatorname\*?)\s*\{\s*(arc(?:sin|cos|tan)|sinh|cosh|tanh|ln|log|exp)\s*\}"
        r"(?=\s*[\d(\\{a-z_])",
        r"\\\1 ",
    ),
    (r"\\(?:text|operatorname\*?)\s*\{\s*(lcm|gcd)\s*\}", r"\\operatorname{\1}"),
    (r"\\operatorname\*?\s*\{(?!lcm|gcd)", r"\\text{"),
    (r"\\arctg(?![a-zA-Z])", r"\\arctan"),
    (r"\\tg(?![a-zA-Z])", r"\\tan"),
    (r"\\(?:ctg|cotg)(?![a-zA-Z])", r"\\cot"),
    (r"\\cosec(?![a-zA-Z])", r"\\csc"),
    # functions and constants without their backslash
    (
        r"(?<![\\a-zA-Z])(sqrt|sinh?|cosh?|tanh?|cot|ln|log|lg|exp|arcsin|arccos|arctan)"
        r"(?=\s*[({\d_^\\]| [a-z]\b)",
        r"\\\1",
    ),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])(?:oo|infty|inf)(?![a-zA-Z])|\\infin(?![a-zA-Z])", r"\\infty "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    # \lg is the decimal logarithm
    (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
    (r"\\log\s*_\s*\{?\s*e\s*\}?", r"\\ln "),
    # the imaginary unit, Euler's number and the differential, set upright
    (r"\\text\s*\{\s*([ied])\s*\}", r"\1"),
    (r"\\[ij]math(?![a-zA-Z])", "i"),
    # relations
    (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=|=<", r"\\le "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])|!=|\\not\s*=", r"\\ne "),
    (r"\\colon(?![a-zA-Z])", ":"),
    # sets
    (
        r"\\(?:varnothing|O(?=$)|empty)(?![a-zA-Z])|\\text\s*\{\s*(?:[Tt]he )?empty set\.?\s*\}",
        r"\\emptyset ",
    ),
    (r"\\(?:lbrace|lbrack)(?![a-zA-Z])", lambda m: r"\{" if "brace" in m[0] else "["),
    (r"\\(?:rbrace|rbrack)(?![a-zA-Z])", lambda m: r"\}" if "brace" in m[0] else "]"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:smallsetminus|backslash)(?![a-zA-Z])", r"\\setminus "),
    (
        r"\\(?:Bbb|mathbf|mathbb)\s*\{?\s*([RZNQC])(?![a-zA-Z])\s*\}?(?!\s*\))"
        r"|\\([RZNQC])(?![a-zA-Z])",
        lambda m: rf"\mathbb{{{m[1] or m[2]}}}",
    ),
    # a vector in angle brackets is the tuple
    (r"\\langle(?![a-zA-Z])|^<(?=[^<>]*,[^<>]*>$)", "("),
    (r"\\rangle(?![a-zA-Z])|(?<=\d)>$", ")"),
    (r"\\[lr]vert(?![a-zA-Z])", "|"),
    (r"\\[lr]paren(?![a-zA-Z])", lambda m: "()"["r" in m[0]]),
    # the words between the members of a list
    (
        r"\s*,?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}\s*"
        r"|(?<![A-Za-z]{2})\s*,?\s+(?:and|or)\s+(?![A-Za-z]{2})"
        r"|\s*\\(?:lor|land|vee|wedge)(?=.*(?:[=<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])))"
        r"(?![a-zA-Z])\s*",
        lambda m: " or " if re.search("or|vee", m[0]) else ", ",
    ),
    # the conjugate of a number as written
    (
        r"\\(?:overline|bar)\s*\{([^{}]*\d[^{}]*)\}",
        lambda m: (
            f"({re.sub('(?<![a-zA-Z])i(?![a-zA-Z])', '(-i)', m[1])})" if "i" in m[1] else m[0]
        ),
    ),
    # degrees
    (
        r"\\degree(?![a-zA-Z])|(?<=[\d)}])\^\s*\{?\s*o\s*\}?(?![a-zA-Z])"
        r"|(?:\{\}\s*)?\^\s*\{?\s*\\circ\s*\}?",
        r"^\\circ ",
    ),
)


def normalise(text: str) -> str:
    """Return LaTeX in the one spelling that `readings` understands; "" if nothing is left."""
    text = latex_of(text)
    text = _apply(SPACES, unwrap(text))
    for _ in range(2):  # a full stop may stand inside the braces that a wrapper leaves
        text = strip_braces(_apply(DECORATION, text.strip()).strip())
    return re.sub(r"\s+", " ", plain_numbers(_apply(NAMES, text))).strip()


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
