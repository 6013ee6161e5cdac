"""Comparing LaTeX answers with math-verify (--reward math) in a process of its own, which is killed when a comparison takes too long.

math-verify computes with what a model wrote; nothing else here does. This file, run as a script, is that process, so it imports the
standard library only, and math-verify in `serve_math`.
"""

import dataclasses
import functools
import json
import os
import select
import signal
import subprocess
import sys

MATH_SECONDS = 5  # for one comparison; the median is 0.01
MATH_CHARACTERS = 1000  # longer answers earn nothing


class MathWorker:
    """Compares LaTeX with math-verify in a child process, which starts when first needed and is killed when a comparison takes too long.

    math-verify's own time-outs are signals that Python handles between two bytecodes, and `9^{9^{9^9}}` is a single bytecode. The child
    is a session of its own, so Ctrl-C in the terminal reaches the parent only. The child ends with its parent, however the parent ends:
    at the end of its input, or in the middle of a comparison by an alarm that the kernel delivers (tests/test_reward.py).
    """

    def __init__(self):
        self.process, self.timeouts = None, 0

    def equal(self, given, gold):
        """math-verify's verdict; False when it raises, when the child dies, or after MATH_SECONDS (both counted in `timeouts`)."""
        try:
            if self.process is None or self.process.poll() is not None:  # -P: no module of this folder is in the child's way
                self.process = subprocess.Popen([sys.executable, "-P", __file__, str(MATH_SECONDS + 1)], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
                if self.read(seconds=60) != b"r":
                    from .errors import RunError  # here: the child has no package

                    raise RunError("--reward math: the process that runs math-verify does not start; try python -c 'import math_verify'")
            self.process.stdin.write(json.dumps([given, gold]).encode() + b"\n")
            verdict = self.read(MATH_SECONDS)
        except BaseException:  # Ctrl-C, say: the next answer must not be this one's
            self.stop()
            raise
        if not verdict:
            self.stop()
            self.timeouts += 1
        return verdict == b"1"

    def read(self, seconds):
        """One byte from the child, or none when the child is too late or dead."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.read(1) if ready else b""

    def stop(self):
        """Kill the child; the next comparison starts another."""
        if self.process is not None:
            with self.process:
                self.process.kill()
            self.process = None


MATH = MathWorker()


@functools.lru_cache(maxsize=10_000)  # a group repeats itself
def math_equal(given, gold):
    """Are two answers equal by math-verify?"""
    return MATH.equal(given, gold)


def math_timeouts():
    """Number of comparisons that were given up since the process began."""
    return MATH.timeouts


def make_exact(grader):
    """Put exact comparisons in the place of math-verify's: it calls 10^{-20} and 10^{-19} equal, and 0 = 1 and x^2+1 = 0."""
    numeric, relations = grader.sympy_numeric_eq, grader.sympy_compare_relational

    def size(number):  # evalf goes on until the digits are right, or 1000 of them have cancelled out
        return abs(number.evalf(15, maxn=1000))

    def same_number(a, b, *precision):
        if hasattr(a, "shape") or hasattr(b, "shape") or a.is_Number or b.is_Number or any(map(grader.get_pct_val, (a, b))):
            return numeric(a, b, *precision)
        return bool(a.is_number and b.is_number and size(a - b) <= max(size(a), size(b)) / 10**900)

    def same_solutions(gold, given, *_):  # one equation is a multiple of the other
        if gold.rel_op != "==" or given.rel_op != "==":
            return False
        ratio = ((gold.lhs - gold.rhs) / (given.lhs - given.rhs)).simplify()
        return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)

    def same_relation(gold, given, *precision):  # one without a variable says nothing
        sides = [(each.lhs - each.rhs).simplify() for both in (gold, given) for each in getattr(both, "_unsorted_args", None) or (both,)]
        return all(side.free_symbols for side in sides) and relations(gold, given, *precision)

    grader.sympy_numeric_eq, grader.sympy_solve_and_compare, grader.sympy_compare_relational = same_number, same_solutions, same_relation


def serve_math(seconds):
    """The child reads lines [given, gold] and answers each with one byte, "1" or "0"; "r" comes first. Over `seconds` it ends itself."""
    from math_verify import LatexExtractionConfig, grader, parse, verify

    make_exact(grader)
    normalization = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)  # its units are 3 t and 5 million, too
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    verdicts, silence = os.fdopen(os.dup(1), "wb", buffering=0), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever sympy prints must not become a verdict
    os.dup2(silence, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # without a handler an alarm ends the process, also inside one long bytecode

    def read(answer):  # LaTeX only: the other reader of math-verify is sympy's parse_expr, which evaluates
        found = parse(f"\\boxed{{{answer}}}", [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
        return [each if isinstance(each, str) else each.xreplace(  # decimals are fractions
            {number: grader.Rational(str(number)) for number in each.atoms() if number.is_Float}) for each in found]

    verdicts.write(b"r")
    for line in sys.stdin.buffer:
        signal.alarm(seconds)
        given, gold = json.loads(line)
        try:
            equal = verify(read(gold), read(given), timeout_seconds=None)
        except Exception:  # sympy raises anything; what cannot be compared is not equal
            equal = False
        signal.alarm(0)
        verdicts.write(b"1" if equal else b"0")


if __name__ == "__main__":
    serve_math(int(sys.argv[1]))
