"""Are the shape comments true?"""

import ast
import importlib.util
import io
import re
import sys
import tokenize
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import grpo
import luffy
import prefixrl
import repo
import sft

CORE = ("group_advantages", "policy_loss", "rollout", "score_rows", "update", "rephrase_failed_groups", "prefix_metrics")
COMPLETE = ("group_advantages", "policy_loss")  # here every tensor has its comment
COMMENT = re.compile(r"# \((?P<axes>[^)]*)\)(?P<each> each)?(?: (?P<dtype>bool|float32|float64|int64)\b)?")


class ShapeComments:
    """Compares the shape comments of a script's functions with the tensors that are there once each line has run.

    An axis is a number, or a name that is bound when a call first meets it and keeps its size until that call ends; only b and t, the
    rows and tokens of a micro-batch, may have another size, of at most B and T, each time that a line runs.
    `wrong` collects what does not hold, `checked` the lines whose comment was compared, `statements` is {function: {line: its
    statement and comment}}.
    """

    def __init__(self, module, functions=CORE, complete=COMPLETE):
        source = open(module.__file__).read()
        self.file, self.complete, self.wrong, self.checked = module.__file__, complete, [], set()
        comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
                    if token.type == tokenize.COMMENT}
        self.statements, self.fields = {}, {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                simple = [part for part in ast.walk(node) if isinstance(part, ast.stmt) and not hasattr(part, "body")]
                self.statements[node.name] = {line: (part, COMMENT.match(comments.get(part.end_lineno, "")))
                                              for part in simple for line in range(part.lineno, part.end_lineno + 1)}
            if isinstance(node, ast.ClassDef) and node.name == "Batch":
                self.fields = {part.target.id: (part, COMMENT.match(comments.get(part.end_lineno, "")))
                               for part in node.body if isinstance(part, ast.AnnAssign)}

    def commented(self):
        """{line: function} of every shape comment; the fields of Batch count as a function."""
        places = {part.end_lineno: name for name, lines in self.statements.items() for part, comment in lines.values() if comment}
        return places | {part.end_lineno: "Batch" for part, comment in self.fields.values() if comment}

    @contextmanager
    def watching(self):
        """Compare whatever runs inside."""
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def enter(self, frame, event, arg):
        name = frame.f_code.co_name
        if frame.f_code.co_filename != self.file or name not in self.statements:
            return None
        axes, last = known_axes(name, frame.f_locals), [None]  # the statement that is running

        def step(frame, event, arg):
            current = self.statements[name].get(frame.f_lineno) if event == "line" else None
            if event == "exception":
                last[0] = None
            elif event == "return" and last[0] and isinstance(last[0][0], ast.Return):
                self.compare(name, *last[0], [arg[0] if isinstance(arg, tuple) and arg else arg], axes)
                for batch in arg if isinstance(arg, tuple) else ():
                    self.compare_batch(batch, axes)
            elif last[0] and (event == "return" or current is None or current[0] is not last[0][0]):
                self.compare(name, *last[0], values(last[0][0], frame), axes)
            if event == "line":
                last[0] = current
            return step

        return step

    def compare_batch(self, batch, axes):
        """The fields of the Batch that a rollout returns; None is right where the annotation says so."""
        if type(batch).__name__ == "Batch":
            for field, (part, comment) in self.fields.items():
                value = getattr(batch, field)
                if comment:
                    self.compare("Batch", part, comment, [] if value is None and "None" in ast.unparse(part.annotation) else [value], axes)

    def compare(self, function, statement, comment, found, axes):
        place = f"{function}, line {statement.end_lineno}"
        if not comment:
            if function in self.complete and isinstance(statement, ast.Assign) and any(torch.is_tensor(value) for value in found):
                self.wrong.append(f"{place}: no shape comment")
            return
        self.checked.add(statement.end_lineno)
        if len(found) > 1 and not comment["each"]:
            self.wrong.append(f"{place}: several values, so the comment must end in each")
        axes.pop("b", None), axes.pop("t", None)
        expected = [axis.strip() for axis in comment["axes"].split(",") if axis.strip()]
        for value in found:
            if not torch.is_tensor(value):
                self.wrong.append(f"{place}: not a tensor but {type(value).__name__}")
                continue
            sizes = [int(axis) if axis.isdigit() else axes.setdefault(axis, size) for axis, size in zip(expected, value.shape)]
            if len(expected) != value.dim() or sizes != list(value.shape):
                self.wrong.append(f"{place}: {comment[0]} is {tuple(value.shape)} where {axes}")
            if comment["dtype"] and value.dtype != getattr(torch, comment["dtype"]):
                self.wrong.append(f"{place}: {comment[0]} is {value.dtype}")
        if any(axes.get(part, 0) > axes.get(whole, torch.inf) for part, whole in ("bB", "tT")):
            self.wrong.append(f"{place}: a micro-batch is larger than the batch where {axes}")


def known_axes(function, given):
    """Sizes of axes that a call's arguments tell; 0 for an axis that it has not. In `policy_loss`, B and T are the micro-batch's."""
    if function == "policy_loss":
        return {"N": 0, "G": 0, "P": 0, "B": given["logps"].shape[0], "T": given["logps"].shape[1]}
    axes = {}
    if function == "group_advantages":
        axes |= {"G": given["num_generations"], "B": len(given["rewards"]), "P": 0, "T": 0}
    elif "args" in given:
        axes["G"] = given["args"].num_generations
        if "rows" in given:  # a rollout gets one row a prompt, its helpers one a completion and no prompts
            axes |= {"B": len(given["rows"]) * axes["G"]} if function == "rollout" else {"B": len(given["rows"]), "P": 0}
        if "batch" in given:
            (axes["B"], axes["P"]), axes["T"] = given["batch"].prompt_mask.shape, given["batch"].completion_mask.shape[1]
    return axes | ({"N": axes["B"] // axes["G"]} if axes else {})


def values(statement, frame):
    """What an assignment has just bound, one value per target."""
    if not isinstance(statement, (ast.Assign, ast.AugAssign)):
        return []
    target = statement.target if isinstance(statement, ast.AugAssign) else statement.targets[0]
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return [eval(ast.unparse(part), frame.f_globals, frame.f_locals) for part in parts if not isinstance(part, ast.Starred)]


SMALL = ("--max_steps", 1, "--eval_steps", 0, "--prompts_per_step", 4, "--num_hard", 8, "--num_easy", 8)
# Runs that reach, together, every commented line; one hard task gives no group a signal, so no row may be skipped.
DAPO = ("--loss_type", "dapo", "--scale_rewards", "group", "--beta", 0.1, "--entropy_coef", 0.01, "--num_minibatches", 2)
PRINTED = ("--loss_type", "grpo", "--scale_rewards", "none", "--drop_zero_variance", False)
CONSTANT = ("--loss_type", "dr_grpo", "--drop_zero_variance", False)
IMPORTANCE = ("--task", "diary", "--trace_style", "self", "--shaping", "importance")
RUNS = {
    grpo: [DAPO, PRINTED, CONSTANT],
    luffy: [DAPO, PRINTED, CONSTANT + IMPORTANCE],
    repo: [DAPO, (*PRINTED, "--rephrase_ratio", "shaped"), CONSTANT],
    prefixrl: [DAPO, PRINTED, CONSTANT],
    sft: [()],
}


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_every_shape_comment_of_the_core_is_true(script, run_script, capsys):
    """One step of training for each set of flags; every comment must have been compared, and hold each time."""
    comments = ShapeComments(script)
    for number, flags in enumerate(RUNS[script]):
        with comments.watching():
            code, _, err = run_script(script, *SMALL, *flags, "--output_dir", f"run{number}")
        assert code == 0, err
    assert not comments.wrong
    commented = comments.commented()
    assert not {line: function for line, function in commented.items() if line not in comments.checked}, "never run"
    with capsys.disabled():
        counted = ", ".join(f"{function} {count}" for function, count in Counter(commented.values()).items())
        print(f"\n{script.__name__}: {len(commented)} shape comments are true: {counted}")


MADE_UP = '''
import torch

def core(x):
    a = x + 1  # (B, T) float32
    b = a.sum(dim=1)  # (B,)
    b = torch.stack([b,
                     b])  # (2, B) float32
    c = a.mean()
    kept = {}
    kept["c"] = c > 0  # () bool
    d, e = a, a  # (B, T) each
    for _ in range(2):
        a = a[:1]  # (first, T)
    if kept["c"]:
        return b, kept  # (2, B)
    e = 1
    return e
'''
WRONG = [
    ("a = x + 1  # (B, T) float32", "a = x + 1  # (T, B) float32", "core, line 6"),
    ("a = x + 1  # (B, T) float32", "a = x + 1  # (B, T) bool", "torch.float32"),
    ("b = a.sum(dim=1)  # (B,)", "b = a.sum(dim=1)  # (T,)", "core, line 6"),
    ("b = a.sum(dim=1)  # (B,)", "b = a.sum(dim=1)  # ()", "core, line 6"),
    ("b = a.sum(dim=1)  # (B,)", "b = a.sum(dim=1)  # (B, T)", "core, line 6"),
    ("b = a.sum(dim=1)  # (B,)", "b = a.sum(dim=1)", "no shape comment"),
    ("b])  # (2, B) float32", "b])  # (3, B) float32", "core, line 8"),
    ("# () bool", "# () int64", "torch.bool"),
    ("d, e = a, a  # (B, T) each", "d, e = a, x[0]  # (B, T) each", "core, line 12"),
    ("d, e = a, a  # (B, T) each", "d, e = a, a  # (B, T)", "end in each"),
    ("d, e = a, a  # (B, T) each", "d = 1  # (B, T)", "not a tensor but int"),
    ("a = a[:1]  # (first, T)", "a = a[1:]  # (first, T)", "core, line 14"),
    ("return b, kept  # (2, B)", "return b, kept  # (B, 2)", "core, line 16"),
]


def complaints(source, path):
    """What the checker says of the made-up function on a (4, 3) tensor."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("made_up", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    comments = ShapeComments(module, ("core",), ("core",))
    with comments.watching():
        module.core(torch.ones(4, 3))
    return comments


def test_true_comments_are_counted_and_a_missing_one_is_named(tmp_path):
    comments = complaints(MADE_UP, tmp_path / "made_up.py")
    assert comments.wrong == ["core, line 9: no shape comment"]
    assert comments.checked == comments.commented().keys() == {5, 6, 8, 11, 12, 14, 16}


@pytest.mark.parametrize("true, false, complaint", WRONG)
def test_a_wrong_comment_is_seen(tmp_path, true, false, complaint):
    assert MADE_UP.count(true) == 1
    wrong = complaints(MADE_UP.replace(true, false).replace("c = a.mean()", "c = a.mean()  # ()"), tmp_path / "made_up.py").wrong
    assert wrong and any(complaint in sentence for sentence in wrong)
