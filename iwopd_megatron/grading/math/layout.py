"""How an answer is laid out, taken away: colours, fonts, environments, braces around everything."""

from __future__ import annotations

import re

from iwopd_megatron.grading.math.boxes import closing

# a colour or a font size says nothing about a value; the braces that follow stay
PAINT = re.compile(
    r"\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}|\\(?:f?colorbox)\s*(?:\{[^{}]*\}){1,2}"
    r"|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|nonumber|notag"
    r"|centering|noindent|tiny|small|normalsize|large|Large|LARGE|huge|Huge|bfseries|bf|it|sf|tt)"
    r"(?![a-zA-Z])"
)
# mathematics in another font or with a line below is the same mathematics
FONT = re.compile(
    r"\\(?:underline|uline|mathbf|boldsymbol|bm|pmb|mathit|mathnormal|mathsf|mathtt|ensuremath"
    r"|underbrace|overbrace|mathop|mathord|mathrel|boxed|fbox|bbox|textcolor)\s*(?=\{)"
)
# words in another font are words
WORDS = re.compile(
    r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|mbox|hbox|mathrm)\s*\{"
)
ROMAN = re.compile(r"\{\s*\\rm\s+([^{}]*)\}|\\rm\s*\{([^{}]*)\}")
LINES = (
    r"aligned|align\*?|gathered|gather\*?|split|equation\*?|alignat\*?|alignedat|multline\*?"
    r"|displaymath"
)
ENVIRONMENT = re.compile(
    rf"\\begin\s*\{{({LINES})\}}(?:\{{\d\}}|\[\w\])?(.*?)\\end\s*\{{\1\}}", re.DOTALL
)
ARRAY = re.compile(
    r"([(\[])\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*(?:\\right)?\s*[)\]]", re.DOTALL
)
GRID = re.compile(r"\\(begin|end)\s*\{(?:b|B|small|p)?matrix\*?\}(?:\[\w\])?")
# equations one below the other, without the conditions of a piecewise function
SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin\s*\{(cases|array)\}(?:\{[lcr]\})?((?:(?!\\text|\\begin)[^&])*?)\\end\s*\{\1\}",
    re.DOTALL,
)
CONTINUES = re.compile(r"\s*(?:[=<>+\-]|\\(?:le|ge|approx|equiv|cdot|times|ne)\b)")


def unwrap(text: str) -> str:
    """Return the answer without fonts, colours and environments; a matrix becomes a pmatrix."""
    text = PAINT.sub(" ", text)
    text = ENVIRONMENT.sub(_lines, SYSTEM.sub(_lines, text))
    text = ROMAN.sub(
        lambda m: rf"\text{{{m[1] or m[2]}}}", WORDS.sub(r"\\text{", FONT.sub("", text))
    )
    text = re.sub(r"\\left\s*(?=[(\[]\s*\\begin)", "", text)
    text = ARRAY.sub(r"\\begin{pmatrix}\2\\end{pmatrix}", text)
    text = re.sub(r"[(\[]\s*(?=\\begin\{matrix\})", "", text)
    text = re.sub(r"(?<=\\end\{matrix\})\s*(?:\\right)?\s*[)\]]", "", text)
    # a row's end at the end of the last row makes no row
    return re.sub(r"(?:\\\\\s*)+(?=\\end\{)", "", GRID.sub(r"\\\1{pmatrix}", text))


def strip_braces(text: str) -> str:
    """Return the text without braces that enclose all of it."""
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _lines(match: re.Match[str]) -> str:
    """Join the lines of an environment to a list, or to one line where a relation goes on."""
    out = ""
    for line in re.split(r"\\\\(?:\[[^\]]*\])?", match[2].replace("&", " ")):
        if line.strip():
            out += line if not out or CONTINUES.match(line) else f", {line}"
    return out
