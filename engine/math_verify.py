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

MATH_SECONDS = 5  # of processor time, which a busy machine does not shorten, for one comparison; the median is 0.01
MATH_CHARACTERS = 1000  # longer answers earn nothing


class MathWorker:
    """Compares LaTeX with math-verify in a child process, which starts when first needed and is killed when a comparison takes too long.

    math-verify's own time-outs are signals that Python handles between two bytecodes, and `9^{9^{9^9}}` is a single bytecode. The child
    is a session of its own, so Ctrl-C in the terminal reaches the parent only. The child ends with its parent, however the parent ends:
    at the end of its input, or in the middle of a comparison by a timer that the kernel keeps (tests/test_reward.py).
    """

    def __init__(self):
        self.process, self.timeouts = None, 0

    def equal(self, given, gold):
        """math-verify's verdict; False when it raises, and when the child dies, as after MATH_SECONDS, or is silent for a minute.

        `timeouts` counts the latter two.
        """
        try:
            if self.process is None or self.process.poll() is not None:  # -P: no module of this folder is in the child's way
                self.process = subprocess.Popen([sys.executable, "-P", __file__, str(MATH_SECONDS)], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
                if self.read(seconds=60) != b"r":
                    from .errors import RunError  # here: the child has no package

                    raise RunError("--reward math: the process that runs math-verify does not start; try python -c 'import math_verify'")
            self.process.stdin.write(json.dumps([given, gold]).encode() + b"\n")
            verdict = self.read(seconds=60)
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


def comparison():
    """equal(given, gold) of what `parse` returns, in sympy's exact arithmetic. For `verify` 10^{-20} is 10^{-19}, and 0=1 is x=x."""
    import sympy

    def exact(value):  # a decimal is a fraction
        return value.xreplace({number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}).doit()

    def settle(value):
        """Relations as a list, without those that have no variable: a side if no other is left, as of 6+1 = 7, and nan if one is wrong."""
        if isinstance(value, sympy.MatrixExpr):
            return value.doit()
        chain = value.args if isinstance(value, sympy.And) else (value,) if isinstance(value, sympy.Rel) else ()
        calls = {call: sympy.Symbol(str(call), real=True) for link in chain for call in link.atoms(sympy.core.function.AppliedUndef)}
        chain = [link.xreplace(calls) for link in chain]  # f(2) is a variable
        if not all(link.free_symbols or isinstance(link, sympy.Eq) and equal(*link.args) for link in chain):
            return sympy.nan
        return [link for link in chain if link.free_symbols] or (chain[0].rhs if chain else value)

    def listed(value):
        """(kind, values): the kind of brackets of what has an order, the name of what has none, None for what is no list."""
        if isinstance(value, sympy.Interval):
            return (value.left_open, value.right_open), value.args[:2]
        if isinstance(value, sympy.Tuple):
            return (True, True), value.args
        kind = "set" if isinstance(value, sympy.FiniteSet) else "union" if isinstance(value, sympy.Union) else None
        return kind, value.args if kind else ()

    def in_any_order(some, others, same):
        left = list(others)
        for each in some:
            place = next((place for place, other in enumerate(left) if same(each, other)), None)
            if place is None:
                return False
            del left[place]
        return not left

    def same_relation(a, b):
        """Is one a multiple of the other?"""
        a, b = (each.reversed if each.rel_op in (">", ">=") else each for each in (a, b))
        if not (isinstance(a.rhs, sympy.Expr) and isinstance(b.rhs, sympy.Expr)):  # x in a set, (p,q) = (3,2)
            return a.rel_op == b.rel_op and equal(a.lhs, b.lhs) and equal(a.rhs, b.rhs)
        ratio = sympy.simplify(exact(a.lhs - a.rhs) / exact(b.lhs - b.rhs))
        same_sign = ratio.is_positive or ratio.is_negative and isinstance(a, (sympy.Eq, sympy.Ne))
        return bool(a.rel_op == b.rel_op and ratio.is_number and ratio.is_finite and same_sign)

    def equal(a, b):
        a, b = settle(a), settle(b)
        if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
            return a.shape == b.shape and all(map(equal, a.flat(), b.flat()))
        if isinstance(a, list) and isinstance(b, list):
            return in_any_order(a, b, same_relation)
        if isinstance(a, sympy.Set) and isinstance(b, list):
            b = sympy.And(*b).as_set()
        (kind, some), (other, others) = listed(a), listed(b)
        if kind or other:
            return kind == other and (in_any_order(some, others, equal) if isinstance(kind, str) else
                                      len(some) == len(others) and all(map(equal, some, others)))
        if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
            a, b = exact(a), exact(b)
            return not a.has(sympy.nan, sympy.zoo) and not b.has(sympy.nan, sympy.zoo) and (a == b or (a - b).equals(0) is True)
        return isinstance(a, sympy.Set) and a == b

    return equal


def serve_math(seconds):
    """The child reads lines [given, gold] and answers each with one byte, "1" or "0"; "r" comes first. Over `seconds` it ends itself."""
    from math_verify import LatexExtractionConfig, parse

    equal = comparison()
    normalization = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)  # its units are 3 t and 5 million, too
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    verdicts, silence = os.fdopen(os.dup(1), "wb", buffering=0), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever sympy prints must not become a verdict
    os.dup2(silence, 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # without a handler the timer ends the process, also inside one long bytecode

    def read(answer):  # LaTeX only: the other reader of math-verify is sympy's parse_expr, which evaluates
        return parse(f"\\boxed{{{answer}}}", [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)

    verdicts.write(b"r")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        given, gold = map(read, json.loads(line))
        try:
            verdict = bool(given and gold) and equal(given[0], gold[0])
        except Exception:  # sympy raises anything; what cannot be compared is not equal
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        verdicts.write(b"1" if verdict else b"0")


if __name__ == "__main__":
    serve_math(int(sys.argv[1]))
