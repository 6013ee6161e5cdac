"""The log of a run: metrics.jsonl, rollouts in completions/, warnings, the line on screen, the closing table and report.html."""

import re
import weakref

from tqdm import tqdm

from . import ranks
from .errors import RunError, one_line, printable
from .files import append_jsonl, plain, writing
from .reporters import open_reporter
from .rollouts import rollout_line
from .run_folder import read_metrics

UNREWARDED_STEPS = 20  # in a row, until a warning
ACCURACY = re.compile(r"eval/.*/avg@\d+")  # the metric of the headline and the closing table


def due(step, every, args):
    """True at every `every`-th step and at the last one; never where `every` is 0."""
    return bool(every) and (step % every == 0 or step == args.max_steps)


class RunLog:
    """Writes metrics.jsonl, which --report_to also gets, completions/ and, at the end, report.html and a short table."""

    def __init__(self, run_dir, args):
        self.run_dir, self.args, self.first, self.last, self.report = run_dir, args, {}, {}, None
        self.bad_steps = self.unrewarded_steps = 0  # in a row
        records = read_metrics(run_dir)  # of a resumed run
        for metrics in records:
            self.remember(metrics)
        if args.report_to != "none" and ranks.rank() == 0:
            self.report, close = open_reporter(args.report_to, run_dir, records[-1]["step"] + 1 if records else None)
            self.close = weakref.finalize(self, close, 1)  # called when the run dies, however it does, short of a kill

    def remember(self, metrics):
        """Keep the first and the latest evaluation."""
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/") and value is not None}
        self.first, self.last = self.first or evaluated, evaluated or self.last

    def write(self, metrics):
        """Append one line to metrics.jsonl, and report it without its nulls."""
        append_jsonl(self.run_dir / "metrics.jsonl", [metrics])
        if self.report is not None:
            values = {name: metrics[name] for name, value in plain(metrics).items() if value is not None and name != "step"}
            with writing(self.run_dir):
                self.report(values, step=metrics["step"])
        self.remember(metrics)

    def step(self, metrics, samples, advantages=None, tokens=None):
        """Log a training step: metrics every --logging_steps and with every evaluation, rollouts every --save_completions_steps.

        samples: B of them; advantages (B,) or None; tokens: of `score_tokens`. Returns the RunError that ends the run, or None.
        """
        step = metrics["step"]
        if due(step, self.args.logging_steps, self.args) or any(key.startswith("eval/") for key in metrics):
            self.write(metrics)
        if ranks.rank() == 0 and due(step, self.args.save_completions_steps, self.args):
            folder = self.run_dir / "completions"
            with writing(folder):
                folder.mkdir(exist_ok=True)
            values = [None] * len(samples) if advantages is None else advantages.tolist()
            append_jsonl(folder / f"step-{step:06d}.jsonl", map(rollout_line, samples, values, tokens or [{}] * len(samples)))
        return self.watch(metrics)

    def watch(self, metrics):
        """Warn once when nothing is rewarded. After --max_bad_steps bad steps in a row return the RunError that ends the run."""
        # Where a teacher's rows are in the groups, the reward of the policy's own rows counts.
        self.unrewarded_steps = self.unrewarded_steps + 1 if metrics.get("onpolicy/reward", metrics.get("reward")) == 0 else 0
        if self.unrewarded_steps == UNREWARDED_STEPS:
            cut = metrics["completions/clipped_ratio"]
            tqdm.write(f"warning: the reward was 0 in each of the last {UNREWARDED_STEPS} steps. Likely reasons: "
                       + (f"{cut:.0%} of the completions are cut off (--max_completion_length); " if cut > 0.5 else "")
                       + "the prompt is not rendered as the model expects (--template), the answer is not where --reward looks for it "
                       "(read completions/), or the problems are out of the model's reach (docs/faq.md, question 2)")
        self.bad_steps = self.bad_steps + 1 if metrics["skipped_updates"] else 0
        if self.bad_steps == self.args.max_bad_steps:
            return RunError(f"the loss or its gradient was not finite in {self.bad_steps} steps in a row (--max_bad_steps): "
                            f"checkpoint-{metrics['step']} has the weights, which no skipped update has touched")
        return None

    def headline(self, metrics):
        """The line beside the progress bar: reward, accuracy at the latest evaluation, groups without signal."""
        solved = [f"{printable(key.split('/', 1)[1].rpartition('/')[0])} {value:.0%}" for key, value in self.last.items()
                  if ACCURACY.fullmatch(key)]
        name, signal = "reward" if "reward" in metrics else "loss", metrics.get("frac_reward_zero_std")
        return " | ".join([f"{name} {metrics[name]:.2f}", *([f"solved: {', '.join(solved)}"] if solved else []),
                           *([] if signal is None else [f"no signal in {signal:.0%} of groups"]),
                           *([f"{metrics['skipped_updates']} updates skipped"] if metrics["skipped_updates"] else [])])

    def finish(self):
        """Print the evaluation before and after, write report.html, and say where everything is; rank 0 does."""
        from .report import write_report  # not above: python -m engine.report would import itself

        if ranks.rank():
            return
        for key in self.last:
            if ACCURACY.fullmatch(key) and key in self.first and key + "_se" in self.last:
                print(f"{printable(key):<20} {self.first[key]:6.3f} -> {self.last[key]:6.3f} +- {self.last[key + '_se']:.3f}")
        try:
            write_report([self.run_dir])
        except Exception as error:  # whatever it is: the run is whole, and its report can be written later
            print(f"warning: no report.html: {printable(one_line(error))}")
        if self.report is not None:
            _, close, *_ = self.close.detach()
            close(0)
        print(f"the trained model and the records of the run are in {self.run_dir}")
