"""Every rule of the math grader by itself: what it rewrites, what it leaves, what it refuses."""

import pytest
import sympy
from test_math_pairs import TABLES, read_table

from iwopd_megatron.grading.math import guards as math_guards
from iwopd_megatron.grading.math import normalise as math_normalise
from iwopd_megatron.grading.math import units as math_units
from iwopd_megatron.grading.math import words as math_words
from iwopd_megatron.grading.math.boxes import last_boxed, last_boxes
from iwopd_megatron.grading.math.characters import PLAIN, latex_of
from iwopd_megatron.grading.math.grader import explain, is_equal, is_right
from iwopd_megatron.grading.math.lists import both_signs, members, named_values
from iwopd_megatron.grading.math.normalise import normalise
from iwopd_megatron.grading.math.readings import read
from iwopd_megatron.grading.math.regions import region

NORMALISED = [
    # one alphabet
    ("４２", "42"), ("–5", "-5"), ("2×3", r"2\times 3"), ("x²", "x^{2}"), ("a₁₂", "a_{12}"),
    ("½", r"\frac{1}{2}"), ("4√2", r"4\sqrt{2}"), ("³√8", r"\sqrt[3]{8}"),
    ("x²√3", r"x^{2}\sqrt{3}"),
    ("（1，2）", "(1,2)"), ("5\u00a0", "5"), ("π/6", r"\pi /6"), ("ℝ", r"\mathbb{R}"),
    # layout
    (r"\color{red}{42}", "42"), (r"\textcolor{blue}{\frac12}", r"\frac{1}{2}"),
    (r"\underline{42}", "42"), (r"{\bf 42}", "42"), (r"{\rm cm}", r"\text{cm}"),
    (r"\begin{aligned} x &= 5 \\ &= 6 \end{aligned}", "x = 5 = 6"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=1, y=2"),
    (r"\left[\begin{array}{cc}1&0\\0&1\\\end{array}\right]",
     r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
    (r"\left( 1 , 2 \right)", "( 1 , 2 )"), (r"\big(2\big)", "(2)"), (r"3\hspace{2pt}x", "3 x"),
    ("**42**", "42"), ("2**3", "2^3"), ("`17`", "17"), (r"17\checkmark", "17"), ('"yes"', "yes"),
    (r"\phantom{x}5", "5"), (r"\leftarrow x", r"\leftarrow x"),
    # numbers
    (r"1\,234\,567", "1234567"), ("12 345", "12345"), (r"1{,}024", "1024"), (r"2{,}5", "2.5"),
    ("1'000", "1000"), ("1.000.000", "1000000"), ("(1,000)", "(1000)"), ("(1,234)", "(1,234)"),
    ("1,024", "1024"), ("1, 2", "1, 2"), ("007", "7"), ("0.5", "0.5"),
    ("1.5e3", r"1.5\cdot 10^{3}"),
    ("2e", "2e"), (r"0.\overline{3}", r"\frac{3}{9}"), (r"0.1\dot{6}", r"\frac{15}{90}"),
    (r"0.333\ldots", r"\frac{3}{9}"), ("1 1/2", r"1\frac{1}{2}"), (r"\frac12", r"\frac{1}{2}"),
    (r"\frac\pi4", r"\frac{\pi}{4}"), (r"\tfrac{1}2", r"\frac{1}{2}"), (r"\sqrt2", r"\sqrt{2}"),
    ("{5 \\over 8}", r"\frac{5 }{8}"), (r"{7 \choose 2}", r"\binom{7}{2}"), ("5!!", "15"),
    ("5!", "5!"), (r"5\text{ million}", r"5\cdot 10^{6}"), (r"\text{50\%}", r"50\%"),
    # names
    (r"2\mathrm{i}", "2i"), (r"\mathrm{e}^2", "e^2"), (r"\lg 2", r"\log_{10} 2"),
    (r"\log_e 2", r"\ln 2"), ("2pi", r"2\pi"), ("sqrt(5)", r"\sqrt{5}"),
    (r"\operatorname{ln} 3", r"\ln 3"), (r"\varnothing", r"\emptyset"), (r"\{\}", r"\emptyset"),
    (r"\langle 1,2\rangle", "( 1,2)"), (r"x\leqslant 3", r"x\le 3"), ("x>=3", r"x\ge 3"),
    (r"1\text{ or }2", "1 or 2"), ("1 and 2", "1, 2"), (r"\text{Yes and no}", r"\text{Yes and no}"),
    (r"45\degree", r"45^\circ"), (r"p\lor q", r"p\lor q"), (r"\overline{3+4i}", "(3+4(-i))"),
    (r"\mathrm{lcm}(4,6)", r"\operatorname{lcm}(4,6)"),
    # the end of a sentence
    ("5.", "5"), ("42,", "42"), (r"5\text{.}", "5"), ("= 5", "5"), (r"\approx 5", "5"),
    ("...", "..."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "spelling"), NORMALISED)
def test_normalised(text, spelling):
    assert normalise(text) == spelling


def test_an_answer_in_the_one_spelling_stays_as_it_is():
    for text, _ in NORMALISED:
        once = normalise(text)
        assert normalise(once) == once, text


def test_every_rule_is_needed_by_a_pair_or_an_example(monkeypatch):
    """Each pattern matches something that an earlier rule has left."""
    texts = {text for name in TABLES for row in read_table(name) for text in row[2:]}
    fired = set()

    def apply(rules, text):
        for pattern, replacement in rules:
            text, count = pattern.subn(replacement, text)
            if count:
                fired.add(pattern)
        return text

    monkeypatch.setattr(math_normalise, "_apply", apply)
    for text in [*texts, *(text for text, _ in NORMALISED), *MORE]:
        normalise(text)
    rules = [*math_normalise.SPACES, *math_normalise.DECORATION, *math_normalise.NAMES]
    assert [rule.pattern.pattern for rule in rules if rule.pattern not in fired] == []


MORE = [  # for rules that no pair needs
    "*42*",
    r"\text{arctan} 2",
    r"\arctg 1",
    r"\tg x",
    r"\ctg x",
    r"\cosec x",
    "oo",
    r"2\imath",
    r"x \lt 3",
    r"x \gt 3",
    r"A \smallsetminus B",
    r"\lvert x\rvert",
    r"\lparen 1\rparen",
    r"x\colon y",
    r"\big\{1\big\}",
    r"\rbrace",
    "1 \\ 2",
]


def test_characters_are_read_alike():
    assert all(latex_of(latex_of(c)) == latex_of(c) for c in PLAIN)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed 7", "7"),
        (r"\boxed {42}", "42"),
        (r"\fbox{42}", "42"),
        (r"\framebox{8}.", "8"),
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed-3", "-3"),
        (r"\boxed", None),
        (r"\boxedness{3}", None),
    ],
)
def test_boxes_of_every_spelling(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{1} and \boxed{2}", ["1", "2"]),
        (r"$x_1=\boxed{1}$, $x_2 = \boxed{2}$", ["1", "2"]),
        (r"\boxed{1} \text{ or } \fbox{2}", ["1", "2"]),
        (r"\boxed{1}, so not 3, but \boxed{2}", ["2"]),
        (r"\boxed{1} \boxed{2}", ["2"]),
        ("none", []),
    ],
)
def test_boxes_side_by_side(text, contents):
    assert last_boxes(text) == contents


def test_several_boxes_are_a_list_only_for_a_list():
    assert is_right(r"\boxed{1} and \boxed{2}", r"\{2, 1\}")
    assert is_right(r"\boxed{1} and \boxed{2}", "2")  # the last one counts
    assert not is_right(r"\boxed{1} and \boxed{2}", "1")
    assert not is_right(r"\boxed{1}. Then \boxed{2}", r"\{1, 2\}")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (r"10\text{ cm}", "10", "cm"),
        (r"12 \text{cm}^2", "12", "cm^2"),
        (r"72\text{ square feet}", "72", "ft^2"),
        (r"9.8 \text{m}/\text{s}^2", "9.8", "m/s^2"),
        (r"\text{204 minutes}", "204", "min"),
        ("12 cm", "12", "cm"),
        ("14 people", "14", "?"),
        (r"50\%", "50", "percent"),
        (r"45^\circ", "45", "degree"),
        (r"45^\circ\text{C}", "45", "degreeC"),
        (r"\$18.90", "18.90", "dollar"),
        (r"5^{\text{th}}", "5", ""),
        ("3t", "3t", ""),
        (r"\frac{1}{2} x^2", r"\frac{1}{2} x^2", ""),
        (r"\frac{1}{2} n", r"\frac{1}{2} n", ""),
        ("24 abcd", "24 abcd", ""),
        (r"6\text{ and }7", r"6\text{ and }7", ""),
    ],
)
def test_units(text, value, unit):
    assert math_units.split_unit(text) == (value, unit)


def test_units_are_compared_where_the_reference_has_a_known_one():
    assert math_units.agree("cm", "") and math_units.agree("", "cm") and math_units.agree("?", "cm")
    assert math_units.agree("cm", "cm") and not math_units.agree("cm", "m")
    assert not is_equal(r"10\text{ cm}", r"10\text{ m}")
    assert not is_equal(r"100\text{ cm}", r"1\text{ m}")  # never converted


def test_readings_of_a_percentage_and_an_angle():
    assert is_equal(r"50\%", "50") and is_equal(r"50\%", "0.5") and is_equal("50", r"50\%")
    assert not is_equal(r"50\%", r"0.5\%")
    assert is_equal(r"45^\circ", "45") and is_equal(r"45^\circ", r"\frac\pi4")
    assert not is_equal(r"45^\circ", r"\frac\pi4^\circ")


def test_a_bare_logarithm_has_two_bases_but_one_at_a_time():
    assert is_equal(r"\log 2", r"\ln 2") and is_equal(r"\log 100", "2")
    assert not is_equal(r"\log 2", r"\log_2 10") and not is_equal(r"\lg 2", r"\ln 2")


@pytest.mark.parametrize(
    ("text", "letter", "rest"),
    [
        ("C)", "C", ""),
        ("(C)", "C", ""),
        (r"\text{(C)}", "C", ""),
        (r"(E) 12", "E", "12"),
        (r"\text{A) 17}", "A", r"\text{17}"),
        (r"\text{Option B}", "B", ""),
        ("(a)b", "", "(a)b"),
        ("(A)(B)", "", "(A)(B)"),
        ("e", "", "e"),
        ("AB", "", "AB"),
    ],
)
def test_choices(text, letter, rest):
    assert math_words.choice(text) == (letter, rest)


def test_words():
    assert math_words.word(r"\text{Yes, it is}") == "yes"
    assert math_words.word(r"\text{no solutions}") == math_words.word(r"\emptyset") == "none"
    assert math_words.word("x = 2") is None
    assert not math_words.is_word("x") and math_words.is_word(r"\text{even}")
    assert math_words.as_latex(r"\text{-infinity}") == r"-\infty"


def test_lists():
    assert members(r"(1,2), \{3,4\} or \frac{5,}{6}") == ["(1,2)", r"\{3,4\}", r"\frac{5,}{6}"]
    assert both_signs(r"1\pm\sqrt{2}") == r"1+\sqrt{2}, 1-\sqrt{2}"
    assert both_signs(r"\frac{\pm 1 \mp 2}{3}") == r"\frac{1 -2}{3}, \frac{-1 +2}{3}"
    assert both_signs(r"(\pm 1,\pm 2)") == r"(\pm 1,\pm 2)"  # which go together is not said
    assert named_values("(x,y)", "(1,2)") == {"x": "1", "y": "2"}
    assert named_values("", "x=1, x=2") is None


def test_regions():
    assert region(r"x\le 3").numbers == sympy.Interval(-sympy.oo, 3)
    assert region(r"1<x\le 2").numbers == sympy.Interval.Lopen(1, 2)
    assert region(r"\{x : x>2\}").numbers == sympy.Interval.open(2, sympy.oo)
    assert region("x<y") is None and region("5") is None
    assert not is_equal("1<x<2", "1<y<2")


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("0.1234567", "0.1234568", False),
        ("0.5", "0.50", True),
        ("1.4142136", "1.41421356", True),
        ("0.0000001", "0.00000012", False),
        ("0.142857", "0.1428571", True),
        ("0.1428570", "0.1428571", False),
        ("3.14", "3.142", False),
        ("1/2", "0.5", None),
    ],
)
def test_decimals_as_written(answer, reference, verdict):
    assert math_guards.decimals(answer, reference) is verdict


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("1/2**99", "1/2**98", False),
        ("1/factorial(2025)", "1/factorial(2024)", False),
        ("0.333333", "1/3", True),
        ("0.0000003", "1/3000001", False),
        ("1.0000001", "1", False),
        ("sqrt(10**20 + 1)", "10**10", False),
        ("sqrt(3 + 2*sqrt(2))", "1 + sqrt(2)", True),
        ("exp(-40)", "exp(-41)", False),
        ("x + 1/10**12", "x", False),
        ("(x + 1)**2", "x**2 + 2*x + 1", True),
        ("sqrt(3 + 2*sqrt(2)) - 1 - sqrt(2)", "0", True),
    ],
)
def test_guards(answer, reference, verdict):
    assert math_guards.agree(sympy.sympify(answer), sympy.sympify(reference)) is verdict


def test_equations_without_solutions_are_not_equal():
    assert not is_equal("x^2+1=0", "x^2+2=0") and not is_equal("f(2)=5", "f(3)=5")
    assert is_equal("3x+4y=12", "6x+8y=24")


def test_names():
    assert read("x = 5")[3:5] == ("x", "5") and read(r"\text{Answer: }70").value == "70"
    assert read(r"\text{at least } 5").value != "5"
    assert is_equal("x=5", "5") and is_equal("5", "x=5") and not is_equal("x=5", "y=5")


def test_reasons():
    assert explain(r"\boxed{\frac{27}{2}}", "14") == "27/2 is not 14"
    assert explain(r"\boxed{\frac{27}{2}}", r"\frac{54}{4}") == "both are 27/2"
    assert explain(r"\boxed{\frac{27}{2}}", "13.5") == "27/2 is 13.5"
    assert explain(r"\boxed{10\text{ cm}}", r"10\text{ m}") == "10 cm is not 10 m"
    assert explain(r"\boxed{\frac{1}{", "1").startswith("no box of the answer is complete")


LONG = [
    "a",
    "a b ",
    "ab ",
    "1",
    "1,",
    "12 ",
    "\\text{a} ",
    "{",
    "}",
    "(",
    "\\frac",
    "\\sqrt",
    "x_1",
    "x_{1}",
    "\\pm 1,",
    "$",
    "**",
    "_",
    "^",
    "\\ ",
    "or ",
    "A) ",
    "1 1/2 ",
    "\\left(",
    "\\{",
    "a=b=",
    "\\mathbb{R}",
    "|x|",
    "1.5e3",
    "!",
    "√",
    "½",
    "is ",
    "\\text{",
    "5\\text{ m}",
    "x\\le ",
    "\\begin{aligned}",
    "5 cm ",
]


@pytest.mark.timeout(100)
def test_long_answers_are_read_in_no_more_than_one_pass():
    """An expression with two ways to match the same text would take longer than anyone waits."""
    for piece in LONG:
        read(piece * 200)
        read(f"5 {piece * 200}!")
        last_boxes(piece * 200 + r"\boxed{1}" * 20)
