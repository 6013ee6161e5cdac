"""--explain: one step of a script, watched as it runs, in words and numbers; nothing is written.

The functions that the script itself defines are watched, and of each its arguments and local variables are printed under the names that
they have in the code. A fork is explained as it stands.
"""

import inspect
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ranks
from .data import step_problems
from .errors import printable
from .models import seed_everything
from .optimization import optimizer_step
from .rollouts import token_pieces
from .scoring import Rows, policy_logps

WIDTH, MOST_LINES, CELLS, MOST_STEPS = 110, 76, 8, 20


def is_sample(value):
    return hasattr(value, "ids") and hasattr(value, "reward") and hasattr(value, "problem")


def brief(text, width):
    """A text in quotes, `width` characters wide at most."""
    text = printable(" ".join(str(text).split()))
    return f'"{text}"' if len(text) <= width - 2 else f'"{text[: width - 5]}..."'


def cell(value):
    """A number in 8 characters."""
    if not isinstance(value, float):
        return str(value)[:8]
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


class Watch:
    """The calls of a script's functions in one step: of each the first one that has to do with the chosen row."""

    def __init__(self, script, model, tokenizer, args):
        self.script, self.model, self.tokenizer, self.args = os.path.abspath(script), model, tokenizer, args
        self.calls = {}  # code of a function: {times it was called, and of the call that is shown: number, values, part, place of the row}
        self.samples, self.signal = None, True

    def __call__(self, frame, event, result):
        """For sys.setprofile: a function returns."""
        if event != "return":
            return
        code = frame.f_code
        own = code.co_qualname.isidentifier() and os.path.abspath(code.co_filename) == self.script  # no method, and no lambda
        if not own and code is not optimizer_step.__code__:
            return
        values = dict(frame.f_locals)
        found = result if isinstance(result, tuple) else ()
        batch, samples = (next(filter(right, found), None) for right in (
            lambda value: isinstance(value, Rows), lambda value: isinstance(value, list) and value and all(map(is_sample, value))))
        if self.samples is None and batch is not None and samples is not None:
            self.choose(batch, samples, values)
        part = next((value for value in values.values() if isinstance(value, Rows)), None)
        place = None if self.samples is None or part is None or part is self.batch else self.place_in(part)
        call = self.calls.setdefault(code, {"times": 0, "place": None, "placed": False})
        call["times"] += 1
        if isinstance(result, torch.Tensor):
            values["returns"] = result
        if not own:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            values |= {"norm, clipped": ranks.full_tensor(torch.nn.utils.get_total_norm(gradients))}
            place = 0 if any(other["place"] is not None for other in self.calls.values()) else None
        if call["times"] == 1 or place is not None and not call["placed"]:
            call |= {"values": values, "place": place if own else None, "placed": place is not None, "part": part,
                     "number": call["times"]}

    def choose(self, batch, samples, values):
        """The most instructive group, one with a signal and a row from elsewhere if there is one, the later the better; and its row."""
        size = getattr(self.args, "num_generations", 1)
        advantages = getattr(batch, "advantages", None)
        self.advantages = [None] * len(samples) if advantages is None else advantages.tolist()
        self.samples, self.batch, self.size = samples, batch, size

        def worth(group):
            rows = range(group * size, (group + 1) * size)
            return (any(self.advantages[row] for row in rows), any(samples[row].source != "rollout" for row in rows),
                    bool(samples[rows[0]].problem.get("prefix")), group)

        self.group = max(range(len(samples) // size), key=worth)
        self.signal = advantages is None or worth(self.group)[0]
        self.rows = range(self.group * size, (self.group + 1) * size)
        self.row = max(self.rows, key=lambda row: (samples[row].source != "rollout", abs(self.advantages[row] or 0.0), -row))
        self.problem = samples[self.row].problem
        self.replaced = [value[self.row] for value in values.values() if isinstance(value, list) and len(value) == len(samples)
                         and is_sample(value[self.row]) and value[self.row] is not samples[self.row]]
        self.before = self.mean_logps()

    def mean_logps(self):
        """Mean log-prob a token of each row of the group under the model as it is now."""
        part = self.batch[torch.tensor(self.rows, device=self.batch.completion_ids.device)]
        with torch.no_grad():
            logps = policy_logps(self.model, part, self.args)[0]  # (G, T)
        return (logps.sum(1) / part.completion_mask.sum(1).clamp(min=1)).tolist()

    def place_in(self, part):
        """The place of the chosen row in a micro-batch, or None."""
        sample = self.samples[self.row]
        completions, prompts = ([ids[mask].tolist() for ids, mask in zip(*rows)] for rows in (
            (part.completion_ids, part.completion_mask), (part.prompt_ids, part.prompt_mask)))
        same = [place for place, row in enumerate(zip(completions, prompts)) if row == (sample.ids, sample.problem["prompt_ids"])]
        return same[0] if same else None

    # ------------------------------------------------------------ words

    def shown(self, name, value, call):
        """A line on a variable, or None where it has no value that belongs to the group."""
        kind, words, number_of_groups = type(value).__name__, "", len(self.samples) // self.size
        if isinstance(value, torch.Tensor):
            kind, own = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}", value.detach()
            if own.dim() and call["place"] is not None and len(own) == len(call["part"].completion_ids):
                own = own[call["place"]]
            elif own.dim() and len(own) == len(self.samples):
                own = own[self.rows.start : self.rows.stop] if own.dim() == 1 else own[self.row]
            elif own.dim() and len(own) == number_of_groups:
                own = own[self.group]
            words = "".join(f"{cell(each):>9}" for each in own.flatten()[:CELLS].tolist()) if own.dim() < 2 else ""
            words = "" if own.dim() and own is not value and own.shape == value.shape and own.numel() > CELLS else words
        elif isinstance(value, Rows):
            fields = [(field, each) for field, each in vars(value).items() if isinstance(each, torch.Tensor)]
            words = "  " + ", ".join(f"{field} {tuple(each.shape)}" for field, each in fields)
        elif isinstance(value, list):
            kind, own = f"list of {len(value)}", [each for each in value if is_sample(each) and each.problem is self.problem]
            if value and all(isinstance(each, (int, float)) for each in value) and len(value) == number_of_groups:
                words = f"{cell(value[self.group]):>9}"
            elif own and len(value) < len(self.samples):
                words = f"  of this problem: reward {own[0].reward}, {brief(own[0].text, 40)}"
        elif isinstance(value, dict) and value and all(isinstance(each, (int, float)) for each in value.values()):
            kind, words = f"{len(value)} numbers", "  " + ", ".join(f"{key} {each:.3g}" for key, each in value.items())
        elif isinstance(value, (bool, int, float, str)):
            words = f"  {brief(value, 70)}" if isinstance(value, str) else f"{cell(value):>9}"
        line = f"  {printable(name):<17} {kind:<16}{words}".rstrip()
        return (line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}...") if words else None

    def section(self, code, call, seen):
        """A function: its signature, and a line on each argument and variable that no other function has shown."""
        source, arguments = inspect.getsource(code), code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        title = f"{code.co_name}({', '.join(arguments)})"[: WIDTH - 40] + f"  {Path(code.co_filename).name}:{code.co_firstlineno}"
        lines = ["", title + (f", call {call['number']} of {call['times']}" if call["times"] > 1 else "")]
        if call["place"] is not None:
            pieces = [printable(piece.strip())[:8] for piece in token_pieces(self.tokenizer, self.samples[self.row].ids)[:CELLS]]
            lines.append(f"  {f'row {self.row}, tokens':<34}" + "".join(f"{piece:>9}" for piece in pieces))

        def line_of(name):
            assigned = re.search(rf"^ +[\w, ()]*\b{re.escape(name)}\b[\w, ()]* = ", source, re.MULTILINE)
            return 0 if name in arguments else assigned.start() if assigned else len(source)

        for name, value in sorted(call["values"].items(), key=lambda item: line_of(item[0])):
            known = (name, value) if isinstance(value, (bool, int, float, str)) else id(value)
            line = None if known in seen else self.shown(name, value, call)
            if line:
                seen.add(known)
                lines.append(line)
        return lines

    def lines(self, step):
        """The whole text, MOST_LINES at most."""
        if self.samples is None:
            return [f"no function of {self.script} has returned a batch (engine.Rows) and the list of its samples"]
        sample, after = self.samples[self.row], self.mean_logps()
        lines = [f"step {step} of {os.path.basename(self.script)}: names and shapes are those of the code", "",
                 f"group {self.group} of {len(self.samples) // self.size}, difficulty {sample.problem.get('difficulty')}, in which "
                 + ("the rewards differ" if self.signal and self.advantages[0] is not None else
                    "every row counts alike" if self.signal else "all rewards are equal: no signal"),
                 f"  prompt        {brief(sample.problem['prompt'], 90)}", f"  right answer  {brief(sample.problem['answer'], 90)}"]
        lines += [f"  prefix        {brief(sample.problem['prefix'], 90)}: given, not trained"] if sample.problem.get("prefix") else []
        lines += ["  row source    ended reward advantage  mean log-prob before -> after the step, completion"]
        for row, before, now in list(zip(self.rows, self.before, after))[:12]:
            one, advantage = self.samples[row], self.advantages[row]
            own = one.text.removeprefix(one.problem.get("prefix") or "")
            lines.append(f"  {row:<3} {one.source:<9.9} {'yes' if one.ended else 'no':<5} {cell(one.reward):>6} "
                         f"{'' if advantage is None else f'{advantage:+.3f}':>9}  {before:.4f} -> {now:.4f}  {brief(own, 46)}")
        lines += [f"  row {self.row} stands where this one was, reward {one.reward}: {brief(one.text, 60)}" for one in self.replaced[:1]]
        for most in range(30, 2, -1):  # of a function, so that all of them have room
            seen, parts = set(), []
            for code, call in self.calls.items():
                part = self.section(code, call, seen)
                parts += part[:most] + [f"  ... {len(part) - most} more"] * (len(part) > most)
            if len(lines) + len(parts) <= MOST_LINES:
                break
        return [line[:WIDTH] for line in (lines + parts)[:MOST_LINES]]


def explained_steps(run):
    """Yield steps of a `Run` until one has a group with a signal, and print what the script has computed in it."""
    args = run.args
    for step in range(run.start, max(run.start + 1, min(run.start + MOST_STEPS, args.max_steps))):
        watch = Watch(run.script, run.model, run.tokenizer, args)
        seed_everything(args.seed, step)
        with watching(watch):
            yield step + 1, step_problems(run.train_problems, args.prompts_per_step, args.seed, step)
        if watch.signal:
            break
    print("\n".join(watch.lines(step + 1)))


@contextmanager
def watching(watch):
    """Context in which the functions of a script are watched."""
    previous = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(previous)
