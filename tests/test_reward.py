"""Does the reward see one answer span, and compare it as it says? Hostile strings never crash, hang, run or earn."""

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

import common
import engine
import eval as eval_script
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import answers, grading, math_verify

ROOT = Path(grpo.__file__).parent
needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
KINDS = [pytest.param(kind, marks=needs_math if kind == "math" else ()) for kind in grading.REWARDS]
HANGS = r"\sum_{i=1}^{10^{12}} i^{1.5}"  # sympy adds it up


@pytest.fixture
def fresh_worker():
    """No worker and no verdict of another test, which may have had another limit."""
    math_verify.MATH.stop()
    math_verify.math_equal.cache_clear()
    yield
    math_verify.MATH.stop()
    math_verify.math_equal.cache_clear()


@pytest.mark.parametrize("text, span", [
    (r"so \boxed{ 12 , 21 }", " 12 , 21 "), (r"\boxed{1} or \boxed{2}", "1, 2"), (r"\boxed{1}, no: \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{a{b}c}d}", "a{b}c"), ("12", None), (r"\boxed{1", None), (r"\boxed{}", None), (r"\boxed {1}", "1"), ("", None),
    (r"\boxed{2} as asked in \boxed{}", "2"), (r"$\boxed{\frac{1}{2}}$ or $\boxed{0.5}$", "0.5"),
    (r"\boxed{1} then \boxed{", None),
])
def test_the_answer_is_the_last_box(text, span):
    assert answers.answer_span(text) == span


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("-3", -3), ("+3", 3), (" 1,234,567 ", 1234567), ("0.5", Fraction(1, 2)), (".5", Fraction(1, 2)), ("3/4", Fraction(3, 4)),
    ("-6/8", Fraction(-3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{3}{4}", Fraction(-3, 4)), ("$7$", 7), ("007", 7),
    ("1/0", None), ("", None), ("-", None), ("1,2", None), ("12,34", None), ("1 2", None), ("1e5", None), ("0.5/2", None), ("nan", None),
    ("inf", None), ("９", None), ("1" * 101, None), ("2**9", None), ("__import__('os')", None), ("1_000", None), (".", None), ("/2", None),
])
def test_numbers_are_parsed_strictly(text, value):
    assert answers.parse_number(text) == value


@pytest.mark.parametrize("kind, given, gold, right", [
    ("exact", " 12 ,  21 ", "12 , 21", 1), ("exact", "12 , 20", "12 , 21", 0), ("exact", "12 , 21 , 3", "12 , 21", 0),
    ("exact", "1,234", "1234", 0),
    ("numeric", "1,234", "1234", 1), ("numeric", "0.50", "1/2", 1), ("numeric", "abc", "abc", 0), ("numeric", "12", "twelve", 0),
    ("boxed", r"\dfrac{1}{2}", "0.5", 1), ("boxed", r"\dfrac{x}{2}", r"\frac{x}{2}", 1), ("boxed", r"\left( 1, 2 \right)", "(1,2)", 1),
    ("boxed", r"\text{ odd }", "odd", 1), ("boxed", "12 , 21", "12,21", 1), ("boxed", "1221", "12 , 21", 0), ("boxed", "x", "X", 0),
    ("boxed", "12.", "12", 1), ("boxed", "A or B", "A", 0), ("boxed", "", "0", 0), ("boxed", "0", "00", 1), ("boxed", "-1", "1", 0),
    ("boxed", r"\leftarrow", "arrow", 0), ("boxed", r"10\,000", "10000", 1), ("boxed", "3", "3.0001", 0),
    ("numeric", r"\$1,000", "1000 dollars", 1), ("numeric", r"50\%", "50", 1), ("numeric", r"50\%", "0.5", 0), ("numeric", "5 cm",
    "6 cm", 0),
    ("choice", r"\text{(B)}", "B", 1), ("choice", "A", "B", 0), ("choice", "A or B", "A", 0), ("choice", "b", "b", 0),
])
def test_grades(kind, given, gold, right):
    assert grading.grade(f"thus \\boxed{{{given}}}", gold, kind) == right


def test_an_answer_outside_the_box_earns_nothing():
    assert grading.grade("the answer is 12", "12") == 0.0


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("3/4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), ("1,234.5", Fraction(2469, 2)), (r"1{,}234", 1234),
    (r"1,\!234,\!567", 1234567), (r"1\,234", 1234), ("12,34", None), ("1,2", None),
    ("50%", 50), (r"50\%", 50), ("50 %", 50), ("50 percent", 50), (r"12.5\%", Fraction(25, 2)), ("%", None), ("5%%", None),
    ("$5", 5), (r"\$5", 5), ("€ 5", 5), (r"-\$5", -5), (r"\$-5", -5), (r"\$1,000", 1000), ("5€", 5), ("$$5", 5), (r"\$\$5", None),
    ("5 cm", 5), ("5cm", None), (r"5\text{ cm}", 5), (r"5\,\text{cm}^2", 5), (r"5~\mathrm{m}", 5), ("5 km/h", 5), ("5 cm^2", 5),
    (r"5\text{ square meters}", 5), (r"\frac{1}{2}\text{ hour}", Fraction(1, 2)), ("90°", 90), (r"90^\circ", 90), (r"90^{\circ}", 90),
    ("5 x", None), ("2x", None), ("5 million", None), (r"5\text{ million}", None), ("2 pi", None), (r"2\pi", None), ("5 or", None),
    ("5 or 6", None), (r"5\text{ or six}", None), (r"5\text{ and }6", None), (r"5\text{6}", None), ("5 nice red apples", None),
    (r"5\text{ of the red apples}", None), ("cm", None), ("x = 5", 5), ("1e5", None), (r"1.2\times 10^3", None), ("1 1/2", None),
    ("5 cm" + " " * 200, 5), ("5" + " " * 200 + "cm", None), ("٥", None),
])
def test_quantities_drop_one_unit_and_nothing_else(text, value):
    assert answers.parse_quantity(text) == value


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), (" B ", "B"), ("(B)", "B"), ("B.", "B"), ("(B).", "B"), (r"\text{B}", "B"), (r"\text{(B)}", "B"), (r"\textbf{(B)}", "B"),
    (r"\mathrm{B}", "B"), ("$B$", "B"), ("b", None), ("(B", None), ("B)", "B"), ("A or B", None), ("A, B", None), ("AB", None), ("", None),
    ("(A)(B)", None), ("B) Paris", "B"), (r"\text{A} B", None), (r"\text{\text{B}}", None), ("В", None), ("Ｂ", None), ("7", None),
    ("B\nA", None), (r"\text{B", None), ("B}", None), ("not B", None),
])
def test_a_choice_is_one_letter_alone(text, letter):
    assert answers.parse_choice(text) == letter


# given, gold, right by boxed, right by math. Ones that look lenient, such as 50\%=0.5, X=x and (7)=7, are what math-verify says.
NEAR = [
    # numbers: two plain ones are compared exactly, also under math
    ("12", "12", 1, 1), ("12", "-12", 0, 0), ("12", "21", 0, 0), ("012", "12", 1, 1), ("12.0", "12", 1, 1), ("12.01", "12", 0, 0),
    ("1,234", "1234", 1, 1), ("1,23", "123", 0, 0), ("0.5", "1/2", 1, 1), (r"\frac{1}{2}", "0.5", 1, 1), (r"\frac{2}{4}", "1/2", 1, 1),
    (r"\frac{2}{1}", "1/2", 0, 0), ("0.333", "1/3", 0, 0), ("0.3333333333", "1/3", 0, 0), ("3", "3.0001", 0, 0), ("-0", "0", 1, 1),
    ("+5", "5", 1, 1), ("--5", "5", 0, 1), ("1/0", "1/0", 1, 1), ("0/1", "0", 1, 1), ("100000000000000000001",
    "100000000000000000000", 0, 0),
    (r"\frac12", r"\frac{1}{2}", 1, 1), (r"\dfrac{1}{2}", r"\frac{1}{2}", 1, 1), (r"1\frac{1}{2}", "1.5", 0, 1), ("10^6", "1000000", 0, 1),
    ("1e6", "1000000", 0, 0), ("2^{10}", "1024", 0, 1), ("2^10", "1024", 0, 1), ("6+1", "7", 0, 1), ("6+1", "8", 0, 0), ("5!", "120", 0, 1),
    (r"\sqrt{49}", "7", 0, 1), (r"-\sqrt{49}", "7", 0, 0), (r"\pm 7", "7", 0, 0), ("7i", "7", 0, 0), (r"7\ne 8", "7", 0, 0),
    (r"\binom{4}{2}", "6", 0, 1), (r"\log_2 8", "3", 0, 1), (r"\sum_{i=1}^{3} i", "6", 0, 1), (r"\sum_{i=1}^{3} i", "5", 0, 0),
    # several answers where one is asked
    ("5 or 6", "5", 0, 0), ("6 or 5", "5", 0, 0), (r"5\text{ or }6", "5", 0, 0), ("5, 6", "5", 0, 0), ("5; 6", "5", 0, 0),
    (r"\{5, 6\}", "5", 0, 0), ("5,6", "6,5", 0, 1), ("1, 2, 3", "1, 2", 0, 0), ("A or B", "A", 0, 0), ("A, B", "A", 0, 0),
    (r"5\quad 6", "5", 0, 0), ("5 $6$", "5", 0, 0), ("$5$ $6$", "6", 0, 0), (r"x=5, x=6", "5", 0, 0), ("5=6", "5", 0, 0),
    # units, names, signs around the number
    ("5 cm", "5", 0, 1), (r"5\text{ cm}", "5", 0, 1), (r"5\text{ cm}", "6", 0, 0), ("x=5", "5", 0, 1), ("x=6", "5", 0, 0), ("y=5",
    "x=5", 0, 0),
    (r"50\%", "50", 0, 1), (r"50\%", "0.5", 0, 1), (r"50\%", "5", 0, 0), (r"\$5", "5", 1, 1), ("5.", "5", 1, 1), (r"90^\circ", "90", 0, 1),
    (r"90^\circ", r"\frac{\pi}{2}", 0, 0), ("5:00", "5", 0, 0), ("10:30", "10:30", 1, 1), (r"1010_2", "10", 0, 0), ("8=7", "7", 0, 0),
    ("7=8", "7", 0, 0), ("(7)", "7", 0, 1), ("8 (7)", "7", 0, 0), (r"7\text{ not }8", "7", 0, 0),
    # words: as words only, since math-verify multiplies letters
    ("odd", r"\text{odd}", 1, 1), ("seat", "east", 0, 0), (r"\mathrm{seat}", r"\mathrm{east}", 0, 0), ("no", "on", 0, 0),
    ("no solution", "no solutions", 0, 0), ("Yes", "yes", 0, 0), ("Tuesday", "Thursday", 0, 0), (r"\text{(B)}", "(B)", 1, 1),
    (r"\text{B}", "(B)", 0, 1), (r"\text{C}", "(B)", 0, 0), ("not 5", "5", 0, 0), ("", "0", 0, 0), (" ", "5", 0, 0), ("?", "5", 0, 0),
    # algebra
    ("1+x", "x+1", 0, 1), ("x-1", "1-x", 0, 0), ("2x", "x2", 0, 1), ("xy", "yx", 0, 0), ("(x-1)(x+1)", "x^2-1", 0, 1),
    ("(x-1)^2", "x^2-1", 0, 0), (r"2\sqrt{2}", r"\sqrt{8}", 0, 1), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", 0, 1),
    (r"\sqrt{2}", "1.414", 0, 0), (r"\pi", "3.14", 0, 0), (r"3\pi", r"\pi", 0, 0), (r"\frac{x}{2}", "0.5x", 0, 1),
    (r"\frac{x}{2}", r"\frac{2}{x}", 0, 0),
    ("x", "y", 0, 0), ("x", "X", 0, 1), ("x_1", "x_2", 0, 0), (r"\sin^2 x+\cos^2 x", "1", 0, 1), ("e^{i\\pi}", "-1", 0, 0), ("1+i",
    "i+1", 0, 1),
    ("1+i", "1-i", 0, 0), ("x>3", "3<x", 0, 1), ("x>3", r"x\ge 3", 0, 0), ("x>3", "x<3", 0, 0), ("y=x", "x=y", 0, 1), ("y=2x",
    "x=2y", 0, 0),
    # tuples, sets, intervals, matrices
    ("(1, 2)", "(1,2)", 1, 1), ("(2,1)", "(1,2)", 0, 0), (r"\{2,1\}", r"\{1,2\}", 0, 1), ("(1,2,3)", "(1,2)", 0, 0),
    ("[0,1]", "[0,1)", 0, 0), ("(0,1)", "[0,1)", 0, 0), (r"x\in[1,2]", "[1,2]", 0, 1), (r"[0,\infty)", r"[0,-\infty)", 0, 0),
    (r"\infty", r"-\infty", 0, 0), (r"\emptyset", r"\{\}", 0, 1), (r"(-\infty,0)\cup(0,\infty)", r"(0,\infty)\cup(-\infty,0)", 0, 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", 0, 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", 0, 0),
]


def test_near_misses_without_math_verify():
    wrong = [pair[:2] for pair in NEAR if grading.grade(f"\\boxed{{{pair[0]}}}", pair[1]) != pair[2]]
    assert len(NEAR) >= 100 and len({pair[:2] for pair in NEAR}) == len(NEAR) and wrong == []


@needs_math
def test_near_misses_with_math_verify():
    wrong = [pair[:2] for pair in NEAR if grading.grade(f"\\boxed{{{pair[0]}}}", pair[1], "math") != pair[3]]
    assert wrong == []


HOSTILE = [
    "\\boxed{" * 10**5, "{" * 10**6, "}" * 10**6, "\\boxed{" + "{" * 10**5 + "}" * 10**5, "\\boxed{" + "{" * 10**6, "\\boxed" * 10**5,
    "\\boxed{" + "9" * 10**5 + "}", "\\boxed{" + "1," * 10**5 + "}", "\\boxed{" + "\\text{" * 10**4 + "}", "\\boxed{" + " " * 10**6 + "}",
    "\\boxed{" + "\\left" * 10**5 + "}", "\\boxed{1/" + "0" * 50 + "}", "\\boxed{" + "$" * 10**5 + "}",
    "\\boxed{\\frac{" + "1" * 10**5 + "}{2}}",
    "\\boxed{" + "-" * 10**5 + "7}", "\\boxed{7" + "\\!" * 10**5 + "x}", "\\boxed{7" + " cm" * 10**4 + "}",
    "\\boxed{" + "\\mathrm{" * 10**4 + "}",
    "\\boxed{" + "(" * 10**5 + "B" + ")" * 10**5 + "}", "\\boxed{0." + "0" * 10**5 + "7}", "\\boxed{" + "A" * 10**6 + "}",
    # these reach math-verify
    "\\boxed{9^{9^{9^9}}}", "\\boxed{9**9**9**9}", "\\boxed{10^{-10^{10}}}", "\\boxed{1e999999999}",
    "\\boxed{" + "\\frac{" * 60 + "1" + "}{2}" * 60 + "}", "\\boxed{" + "\\sqrt{" * 8 + "2" + "}" * 8 + "}",
    "\\boxed{" + "(" * 400 + ")" * 400 + "}",
    "\\boxed{\\frac" * 10 + "}" * 10, "\\boxed{" + "x=" * 20 + "7=8}", "\\boxed{7\\div 0}", "\\boxed{0^{-1}}", "\\boxed{\\frac}",
    "\\boxed{\\begin{pmatrix}}", "\\boxed{\\input{/etc/passwd}}", "\\boxed{\\def\\x{\\x\\x}\\x}", "\\boxed{\\left( 7 \\right]}",
    "\\boxed{7 \\\\ 8}",
    "\\boxed{7\\}", "\\boxed{\\}", "\\boxed{#7}", "\\boxed{7&8}", "\\boxed{7_7^7}", "\\boxed{\\verb|7|8}", "\\boxed{nan}",
    "\\boxed{\\infty}", "\\boxed{zoo}",
    # bytes, scripts, directions
    "\\boxed{\x00}", "\\boxed{7\x00}", "\\boxed{\ud800}", "\\boxed{7\udfff}", "\\boxed{\u202e21}", "\\boxed{\u20667\u2069}",
    "\\boxed{7\u200b}", "\\boxed{\ufeff7}",
    "\\boxed{７}", "\\boxed{٧}", "\\boxed{७}", "\\boxed{⁷}", "\\boxed{Ⅶ}", "\\boxed{㊆}", "\\boxed{½}", "\\boxed{7\u0301}", "\\boxed{－7}",
    "\\bоxed{7}",
    # code, formats, terminals
    "\\boxed{__import__('os').system('touch pwned')}", "\\boxed{().__class__.__bases__[0].__subclasses__()}", "\\boxed{open('pwned','w')}",
    "\\boxed{lambda: 7}", "\\boxed{'7'*10**10}", "\\boxed{exec('7')}", "\\boxed{$(touch pwned)}", "\\boxed{`touch pwned`}",
    "\\boxed{; rm -rf ~ #}",
    "\\boxed{:(){ :|:& };:}", "\\boxed{%s%n%x}", "\\boxed{{0.__class__}}", "\\boxed{{7!r:>99999}}", "\\boxed{%(answer)s}",
    "\\boxed{${answer}}",
    "\\boxed{\x1b[31m7\x1b[0m}", "\\boxed{\x1b]0;7\x07}", "\\boxed{7\r8}", "\\boxed{8\b7}",
    '\\boxed{["7","8"]}', '\\boxed{7"]\n["7","7"]\n}', "\\boxed{7\n8}",
    "\\boxed{<script>7</script>}", "\\boxed{True}", "\\boxed{None}", "\\boxed{*}", "\\boxed{.*}", "\\boxed{answer}", "\\boxed{\\boxed}",
    "\\boxed{gold}",
]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_earns_nothing_and_ends_quickly(kind, monkeypatch, tmp_path, fresh_worker):
    """Each alone, beside a right answer that still earns; under math with a lower limit, which some of them reach."""
    monkeypatch.chdir(tmp_path)  # where the child runs, too
    monkeypatch.setattr(math_verify, "MATH_SECONDS", 1)
    assert len(HOSTILE) >= 60
    for text in HOSTILE:
        began = time.perf_counter()
        assert grading.grade(text, "B" if kind == "choice" else "7", kind) == 0.0, ascii(text[:60])
        assert time.perf_counter() - began < 5, ascii(text[:60])
    assert grading.grade("\\boxed{B}" if kind == "choice" else "\\boxed{7}", "B" if kind == "choice" else "7", kind) == 1.0
    assert list(tmp_path.iterdir()) == []


def test_a_cut_off_completion_earns_nothing_unless_asked():
    samples = [common.Sample({"answer": "7"}, [], [], f"\\boxed{{{answer}}}", ended) for answer, ended in zip("778", (True, False, True))]
    args = SimpleNamespace(reward="boxed", reward_fn=None, grade_truncated=False)
    assert [sample.reward for sample in common.grade(samples, args)] == [1.0, 0.0, 0.0]
    args.grade_truncated = True
    assert [sample.reward for sample in common.grade(samples, args)] == [1.0, 1.0, 0.0]
    assert [sample.reward for sample in samples] == [None] * 3  # graded ones are new


@pytest.mark.parametrize("kind, sound, unsound", [
    ("boxed", ["7", r"\frac{x}{2}", "10:30"], ["}{", "{"]), ("exact", ["7", "a b"], ["}"]), ("numeric", ["7", r"50\%", "5 cm"], ["x", "",
    "1e5"]),
    ("choice", ["B", "(B)"], ["b", "A or B", "7"]),
    pytest.param("math", ["7", r"\frac{x}{2}", "no solution", r"[0,\infty)"], ["}", "?", "", r"\frac", "5:00",
    "x" + "+x" * 600], marks=needs_math),
])
def test_a_gold_answer_must_grade_right_itself(kind, sound, unsound):
    assert [gold for gold in sound if not grading.gold_is_sound(gold, kind)] == []
    assert [gold for gold in unsound if grading.gold_is_sound(gold, kind)] == []


def test_every_script_has_the_same_flags():
    assert get_args(engine.ModelArgs.__annotations__["reward"]) == grading.REWARDS
    for script in (grpo, luffy, repo, prefixrl, sft, eval_script):
        for name in ("reward", "reward_fn", "grade_truncated"):
            assert script.Args.__dataclass_fields__[name] is engine.ModelArgs.__dataclass_fields__[name], f"{script.__name__}: {name}"


def test_nothing_evaluates_text():
    """No eval, exec, compile, sympify or parse_expr in any file of the project; model.eval() is a method without arguments.

    Only the worker imports math-verify and sympy.
    """
    files = [path for folder in (".", "engine", "examples", "tiny_model") for path in sorted((ROOT / folder).glob("*.py"))]
    assert len(files) > 25
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert name not in ("exec", "sympify", "parse_expr", "__import__"), where
                assert name != "eval" or not node.args, where
                assert not (isinstance(node.func, ast.Name) and name in ("eval", "compile")), where
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            foreign = {module.split(".")[0] for module in modules} & {"sympy", "latex2sympy2_extended", "math_verify"}
            assert not foreign or path == ROOT / "engine" / "math_verify.py" and foreign <= {"math_verify", "sympy"}, where


# ---------------------------------------------------------------- the math worker


@needs_math
def test_a_hanging_comparison_is_killed_and_the_next_grades_right(fresh_worker):
    """With the limit as it is: what hangs costs one limit, once, is counted, and leaves no process behind."""
    assert grading.grade(r"\boxed{1+x}", "x+1", "math") == 1.0
    before, worker = math_verify.math_timeouts(), math_verify.MATH.process
    for _ in range(2):  # the second time it is known
        began = time.perf_counter()
        assert grading.grade(f"\\boxed{{{HANGS}}}", "7", "math") == 0.0
        assert time.perf_counter() - began < 60  # the limit is one of processor time
    assert math_verify.math_timeouts() == before + 1 and worker.poll() in (-signal.SIGKILL, -signal.SIGPROF)
    assert grading.grade(r"\boxed{2+x}", "x+2", "math") == 1.0 and grading.grade(r"\boxed{3+x}", "x+2", "math") == 0.0
    assert math_verify.math_timeouts() == before + 1


@needs_math
def test_a_worker_that_dies_costs_one_answer_and_one_killed_between_two_none():
    assert math_verify.MATH.equal("1+x", "x+1")
    math_verify.MATH.process.kill()
    math_verify.MATH.process.wait()
    assert math_verify.MATH.equal("2+x", "x+2")


def test_a_worker_that_cannot_start_ends_the_run_in_one_line_of_its_own(fresh_worker, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr is too old')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(engine.RunError, match="^--reward math: the process that runs math-verify does not start"):
        grading.grade(r"\boxed{1+x}", "x+1", "math")
    assert math_verify.MATH.process is None


@needs_math
@pytest.mark.parametrize("work", ["", HANGS], ids=["idle", "busy"])
def test_the_worker_ends_with_its_parent(work):
    """The parent is killed outright; a worker in the middle of a comparison ends by its own alarm."""
    code = (f"import math_verify as m; m.MATH_SECONDS = 2; m.math_equal('1+x', 'x+1'); print(m.MATH.process.pid, flush=True)\n"
            f"m.math_equal({work!r}, '7') if {work!r} else input()")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "engine", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        worker = parent.stdout.readline().strip()
        time.sleep(0.5)
        parent.kill()

    def state():
        return subprocess.run(["ps", "-o", "stat=", "-p", worker], capture_output=True, text=True).stdout.strip()

    began = time.perf_counter()
    while state() not in ("", "Z", "Zs") and time.perf_counter() - began < 5:
        time.sleep(0.1)
    assert state() in ("", "Z", "Zs")


@needs_math
def test_ctrl_c_reaches_the_parent_only_and_spoils_no_later_answer():
    # A job started in the background ignores Ctrl-C, and so do its children, unless they say otherwise.
    code = ("import math_verify as m, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"m.math_equal('1+x', 'x+1'); print('busy', flush=True)\ntry: m.math_equal({HANGS!r}, '7')\n"
            "except KeyboardInterrupt: print(m.math_equal('2+x', 'x+2'), m.math_equal('3+x', 'x+2'), m.math_timeouts())")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "engine", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              start_new_session=True)
    assert parent.stdout.readline() == "busy\n"
    time.sleep(0.5)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    out, err = parent.communicate()
    assert (out, err) == ("True False 0\n", "")


@needs_math
def test_this_process_does_not_import_math_verify_and_the_worker_no_torch():
    """Nor does a file of ours import sympy; transformers does."""
    assert grading.grade(r"\boxed{5+x}", "x+5", "math") == 1.0
    assert not {"math_verify", "latex2sympy2_extended"} & sys.modules.keys()
    code = "import runpy, sys; runpy.run_path('math_verify.py'); print({'torch', 'numpy', 'sympy', 'math_verify'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT / "engine", capture_output=True, text=True).stdout == "set()\n"


def test_without_math_verify_one_line_before_the_model_loads(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(engine, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    for script in (grpo, eval_script):
        code, _, err = run_script(script, "--reward", "math")
        assert code == 2 and err.endswith(".py: error: --reward math needs the package math-verify: pip install math-verify\n")
        assert err.count("\n") == 1


@needs_math
def test_a_run_with_math_counts_its_timeouts(run_script, tmp_path):
    code, _, err = run_script(grpo, "--task", "diary", "--num_hard", 0, "--num_easy", 8, "--max_steps", 1, "--eval_steps", 0, "--reward",
    "math",
                              "--prompts_per_step", 2, "--num_generations", 2, "--output_dir", "run")
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["reward/timeouts"] == math_verify.math_timeouts() and record["reward"] > 0
