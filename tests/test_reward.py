"""Does the reward see one answer span, and compare it as it says? Hostile strings never crash, hang or earn."""

import time
from fractions import Fraction

import pytest

import common


@pytest.mark.parametrize("text, span", [
    (r"so \boxed{ 12 , 21 }", " 12 , 21 "), (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{a{b}c}d}", "a{b}c"), ("12", None), (r"\boxed{1", None), (r"\boxed{}", ""), (r"\boxed {1}", None), ("", None),
    (r"\boxed{1} then \boxed{", None),
])
def test_the_answer_is_the_last_box(text, span):
    assert common.answer_span(text) == span


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("-3", -3), ("+3", 3), (" 1,234,567 ", 1234567), ("0.5", Fraction(1, 2)), (".5", Fraction(1, 2)), ("3/4", Fraction(3, 4)),
    ("-6/8", Fraction(-3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{3}{4}", Fraction(-3, 4)), ("$7$", 7), ("007", 7),
    ("1/0", None), ("", None), ("-", None), ("1,2", None), ("12,34", None), ("1 2", None), ("1e5", None), ("0.5/2", None), ("nan", None),
    ("inf", None), ("９", None), ("1" * 101, None), ("2**9", None), ("__import__('os')", None), ("1_000", None), (".", None), ("/2", None),
])
def test_numbers_are_parsed_strictly(text, value):
    assert common.parse_number(text) == value


@pytest.mark.parametrize("reward, given, gold, right", [
    ("exact", " 12 ,  21 ", "12 , 21", 1), ("exact", "12 , 20", "12 , 21", 0), ("exact", "12 , 21 , 3", "12 , 21", 0),
    ("exact", "1,234", "1234", 0),
    ("numeric", "1,234", "1234", 1), ("numeric", "0.50", "1/2", 1), ("numeric", "abc", "abc", 0), ("numeric", "12", "twelve", 0),
    ("boxed", r"\dfrac{1}{2}", "0.5", 1), ("boxed", r"\dfrac{x}{2}", r"\frac{x}{2}", 1), ("boxed", r"\left( 1, 2 \right)", "(1,2)", 1),
    ("boxed", r"\text{ odd }", "odd", 1), ("boxed", "12 , 21", "12,21", 1), ("boxed", "1221", "12 , 21", 0), ("boxed", "x", "X", 0),
    ("boxed", "12.", "12", 1), ("boxed", "A or B", "A", 0), ("boxed", "", "0", 0), ("boxed", "0", "00", 1), ("boxed", "-1", "1", 0),
    ("boxed", r"\leftarrow", "arrow", 0), ("boxed", r"10\,000", "10000", 1), ("boxed", "3", "3.0001", 0),
])
def test_grades(reward, given, gold, right):
    assert common.grade(f"thus \\boxed{{{given}}}", gold, reward) == right


def test_an_answer_outside_the_box_earns_nothing():
    assert common.grade("the answer is 12", "12") == 0.0


HOSTILE = [
    "\\boxed{" * 10**5, "{" * 10**6, "\\boxed{" + "{" * 10**5 + "}" * 10**5, "\\boxed{" + "9" * 10**5 + "}",
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{9**9**9**9}", "\\boxed{\x00}", "\\boxed{\ud800}", "\\boxed{\u202e21}", "\\boxed{__import__('os').system('x')}",
    "\\boxed{" + "1," * 10**5 + "}",
    "\\boxed{" + "\\text{" * 10**4 + "}", "\\boxed{" + " " * 10**6 + "}", "\\boxed{" + "\\left" * 10**5 + "}",
    "\\boxed{1/" + "0" * 50 + "}", "\\boxed{" + "$" * 10**5 + "}", "\\boxed{\\frac{" + "1" * 10**5 + "}{2}}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("reward", common.REWARDS)
def test_hostile_text_earns_nothing_and_ends_quickly(text, reward):
    began = time.perf_counter()
    assert common.grade(text, "7", reward) == 0.0
    assert time.perf_counter() - began < 5


def test_a_cut_off_completion_earns_nothing_unless_asked():
    texts = [r"\boxed{7}", r"\boxed{7}"]
    assert common.score(texts, [True, False], ["7", "7"]).tolist() == [1.0, 0.0]
    assert common.score(texts, [True, False], ["7", "7"], grade_truncated=True).tolist() == [1.0, 1.0]
