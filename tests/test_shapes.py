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

import common
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import sampling, scoring

CORE = ("group_advantages", "policy_loss", "rollout", "update", "prefix_metrics")
COMPLETE = ("group_advantages", "policy_loss")  # here every tensor has its comment
SHARED = {sampling: ("pad",), common: ("sample", "rollout_metrics", "reward_by_source"), scoring: ("compute_logps", "minibatches")}
SHAPE = r"\((?P<axes>[^)]*)\)(?: (?P<dtype>bool|float32|float64|int64)\b)?(?P<each> each)?"
PARTS = {"b": "B", "n": "B", "m": "B", "t": "T"}  # a micro-batch, a minibatch, its trained rows; the tokens of a micro-batch


def read_comment(text):
    """The shapes that a comment begins with: one for all values, or one a value; [] for any other comment."""
    unnamed = re.sub(r"\?P<\w+>", "?:", SHAPE)
    listed = re.match(rf"# {unnamed}(?:, {unnamed})*", text)
    return list(re.finditer(SHAPE, listed[0])) if listed else []


def read_source(path):
    """(syntax tree, {line: the shapes of its comment}) of a file."""
    source = open(path).read()
    comments = {token.start[0]: read_comment(token.string) for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    return ast.parse(source), {line: shapes for line, shapes in comments.items() if shapes}


def lines_of(statement):
    """The lines of a statement; of a loop, those of its head."""
    return range(statement.lineno, (statement.iter if isinstance(statement, ast.For) else statement).end_lineno + 1)


def shapes_of(statement, comments):
    """The shapes in the comment of a statement, which stands on any of its lines."""
    return next((comments[line] for line in lines_of(statement) if line in comments), [])


class ShapeComments:
    """Compares the shape comments of a script's functions with the tensors that are there once each line has run.

    An axis is a number, or a name that is bound when a call first meets it and keeps its size until that call ends. Only those of
    PARTS may have another size, of at most the whole, each time that a line runs.
    `wrong` collects what does not hold, `checked` the places whose comment was compared; `elsewhere` are the lines of comments outside
    `functions`; `statements` is {function: {line: its statement and the shapes of its comment}}.
    """

    def __init__(self, module, functions=CORE, complete=COMPLETE):
        tree, comments = read_source(module.__file__)
        self.file, self.complete, self.wrong, self.checked = module.__file__, complete, [], set()
        self.statements, self.fields = {}, {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                bound = [part for part in ast.walk(node)
                         if isinstance(part, ast.For) or isinstance(part, ast.stmt) and not hasattr(part, "body")]
                self.statements[node.name] = {line: (part, shapes_of(part, comments)) for part in bound for line in lines_of(part)}
        for name, path in {"Rows": scoring.__file__, "Batch": self.file}.items() if "rollout" in self.statements else ():
            tree, of_fields = read_source(path)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.name == name:
                    self.fields |= {part.target.id: (name, part, shapes_of(part, of_fields))
                                    for part in node.body if isinstance(part, ast.AnnAssign)}
        watched = {line for lines in self.statements.values() for line in lines}
        self.elsewhere = comments.keys() - watched - {part.end_lineno for name, part, _ in self.fields.values() if name == "Batch"}

    def commented(self):
        """{place: function} of every shape comment; the fields of Batch, and of engine.Rows below it, count as a function."""
        places = {f"{name}, line {lines_of(part)[-1]}": name
                  for name, lines in self.statements.items() for part, shapes in lines.values() if shapes}
        return places | {f"{name}, line {part.end_lineno}": name for name, part, shapes in self.fields.values() if shapes}

    def enter(self, frame, event, arg):
        name = frame.f_code.co_name
        if name not in self.statements:
            return None
        axes, last = known_axes(name, frame.f_locals), [None]  # the statement that is running

        def step(frame, event, arg):
            current = self.statements[name].get(frame.f_lineno) if event == "line" else None
            if event == "exception":
                last[0] = None
            elif event == "return" and last[0] and isinstance(last[0][0], ast.Return):
                self.compare(name, *last[0], [arg[0] if isinstance(arg, tuple) and arg else arg], axes)
                if name == "rollout":
                    self.compare_batch(arg[0], axes)
            elif last[0] and (event == "return" or current is None or current[0] is not last[0][0]):
                self.compare(name, *last[0], values(last[0][0], frame), axes)
            if event == "line":
                last[0] = current
            return step

        return step

    def compare_batch(self, batch, axes):
        """The fields of the Batch that a rollout returns; None is right where the annotation says so."""
        for field, (name, part, shapes) in self.fields.items():
            value = getattr(batch, field)
            if shapes:
                self.compare(name, part, shapes, [] if value is None and "None" in ast.unparse(part.annotation) else [value], axes)

    def compare(self, function, statement, shapes, found, axes):
        place = f"{function}, line {lines_of(statement)[-1]}"
        if not shapes:
            if function in self.complete and isinstance(statement, ast.Assign) and any(torch.is_tensor(value) for value in found):
                self.wrong.append(f"{place}: no shape comment")
            return
        if found:
            self.checked.add(place)
        if len(found) > 1 and len(shapes) == 1 and not shapes[0]["each"]:
            self.wrong.append(f"{place}: several values, so the comment must end in each")
        if len(shapes) > 1 and len(shapes) != len(found):
            self.wrong.append(f"{place}: {len(shapes)} shapes for {len(found)} values")
        for part in PARTS:
            axes.pop(part, None)
        for value, shape in zip(found, shapes if len(shapes) > 1 else shapes * len(found)):
            if not torch.is_tensor(value):
                self.wrong.append(f"{place}: not a tensor but {type(value).__name__}")
                continue
            expected = [axis.strip() for axis in shape["axes"].split(",") if axis.strip()]
            sizes = [int(axis) if axis.isdigit() else axes.setdefault(axis, size) for axis, size in zip(expected, value.shape)]
            if len(expected) != value.dim() or sizes != list(value.shape):
                self.wrong.append(f"{place}: {shape[0]} is {tuple(value.shape)} where {axes}")
            if shape["dtype"] and value.dtype != getattr(torch, shape["dtype"]):
                self.wrong.append(f"{place}: {shape[0]} is {value.dtype}")
        if any(axes.get(part, 0) > axes.get(whole, torch.inf) for part, whole in PARTS.items()):
            self.wrong.append(f"{place}: a micro-batch is larger than the batch where {axes}")


@contextmanager
def watching(*checkers):
    """Compare whatever runs inside."""
    of_file = {checker.file: checker for checker in checkers}

    def enter(frame, event, arg):
        checker = of_file.get(frame.f_code.co_filename)
        return checker and checker.enter(frame, event, arg)

    importlib.import_module("torch._dynamo")  # a step would, and takes ten times as long while lines are traced
    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def known_axes(function, given):
    """Sizes of axes that a call's arguments tell; 0 for an axis that it has not. In `policy_loss`, B and T are the micro-batch's."""
    if function == "policy_loss":
        return {"N": 0, "G": 0, "P": 0, "B": given["logps"].shape[0], "T": given["logps"].shape[1]}
    if function == "group_advantages":
        size = given["num_generations"]
        return {"G": size, "B": len(given["rewards"]), "P": 0, "T": 0, "N": len(given["rewards"]) // size}
    size, axes = getattr(given.get("args"), "num_generations", 1), {}
    for name in ("samples", "prompts", "problems"):
        if name in given:  # a rollout gets a problem a group, its helpers one a row
            axes["B"] = len(given[name]) * (size if function == "rollout" else 1)
            break
    if "batch" in given:
        (axes["B"], axes["P"]), axes["T"] = given["batch"].prompt_mask.shape, given["batch"].completion_mask.shape[1]
    return axes | {"G": size, "N": axes.get("B", 0) // size}


def values(statement, frame):
    """What an assignment or the head of a loop has just bound, one value per target; a loop that never ran has bound nothing."""
    if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.For)):
        return []
    target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    if isinstance(statement, ast.For) and not {part.id for part in parts} <= frame.f_locals.keys():
        return []
    return [eval(ast.unparse(part), frame.f_globals, frame.f_locals) for part in parts if not isinstance(part, ast.Starred)]


SMALL = ("--max_steps", 1, "--eval_steps", 0, "--prompts_per_step", 4, "--num_hard", 8, "--num_easy", 8)
GROUPS = ("--num_generations", 4)
# Runs that reach, together, every commented line; one hard task gives no group a signal, so no row may be skipped.
DAPO = (*GROUPS, "--loss_type", "dapo", "--scale_rewards", "group", "--beta", 0.1, "--entropy_coef", 0.01, "--num_minibatches", 2)
PRINTED = (*GROUPS, "--loss_type", "grpo", "--scale_rewards", "none", "--drop_zero_variance", False)
CONSTANT = (*GROUPS, "--loss_type", "dr_grpo", "--drop_zero_variance", False)
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
    """One step of training for each set of flags; every comment must have been compared, and hold each time.

    The helpers in common.py and engine/ that scripts share are watched beside luffy.py, which calls them all.
    """
    checkers = [ShapeComments(script)]
    checkers += [ShapeComments(module, functions) for module, functions in SHARED.items()] if script is luffy else []
    for number, flags in enumerate(RUNS[script]):
        with watching(*checkers):
            code, _, err = run_script(script, *SMALL, *flags, "--output_dir", f"run{number}")
        assert code == 0, err
    for comments in checkers:
        commented = comments.commented()
        assert not comments.wrong
        assert not comments.elsewhere or comments.file in (sampling.__file__, scoring.__file__), "comments that nothing checks"
        assert not commented.keys() - comments.checked, "never run"
        with capsys.disabled():
            counted = ", ".join(f"{function} {count}" for function, count in Counter(commented.values()).items())
            print(f"\n{comments.file.rsplit('/')[-1]}: {len(commented)} shape comments are true: {counted}")


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
    f, g = a, b  # (B, T) float32, (2, B)
    for row in x:  # (T,) float32
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
    ("# (B, T) float32, (2, B)", "# (B, T) float32, (B, 2)", "core, line 13"),
    ("# (B, T) float32, (2, B)", "# (B, T) float32, (2, B) bool", "core, line 13"),
    ("# (B, T) float32, (2, B)", "# (B, T) float32, (2, B), (2, B)", "3 shapes for 2 values"),
    ("for row in x:  # (T,) float32", "for row in x:  # (B,) float32", "core, line 14"),
    ("a = a[:1]  # (first, T)", "a = a[1:]  # (first, T)", "core, line 15"),
    ("return b, kept  # (2, B)", "return b, kept  # (B, 2)", "core, line 17"),
]


def complaints(source, path):
    """What the checker says of the made-up function on a (4, 3) tensor."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("made_up", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    comments = ShapeComments(module, ("core",), ("core",))
    with watching(comments):
        module.core(torch.ones(4, 3))
    return comments


def test_true_comments_are_counted_and_a_missing_one_is_named(tmp_path):
    comments = complaints(MADE_UP, tmp_path / "made_up.py")
    assert comments.wrong == ["core, line 9: no shape comment"]
    assert comments.checked == comments.commented().keys() == {f"core, line {line}" for line in (5, 6, 8, 11, 12, 13, 14, 15, 17)}


@pytest.mark.parametrize("true, false, complaint", WRONG)
def test_a_wrong_comment_is_seen(tmp_path, true, false, complaint):
    assert MADE_UP.count(true) == 1
    wrong = complaints(MADE_UP.replace(true, false).replace("c = a.mean()", "c = a.mean()  # ()"), tmp_path / "made_up.py").wrong
    assert wrong and any(complaint in sentence for sentence in wrong)
