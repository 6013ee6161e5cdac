"""The log of a run: metrics.jsonl, rollouts in completions/, warnings, the progress bar and the closing table."""

import re
import weakref

from tqdm import tqdm

from . import ranks
from .errors import RunError, printable
from .files import append_jsonl, own_folder, plain, remove, writing
from .reporters import open_reporter, plot_curve
from .run_folder import read_metrics

UNREWARDED_STEPS = 20  # in a row, until a warning


class RunLog:
    """Writes metrics.jsonl, which --report_to also gets, completions/ and, at the end, curve.png and a short table."""

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

    def step(self, metrics, samples, advantages=None):
        """Log a training step: metrics every --logging_steps and with every evaluation, rollouts every --save_completions_steps.

        samples: B of them; advantages (B,) or None. Returns the RunError that ends the run, or None: see `watch`.
        """
        step, last = metrics["step"], metrics["step"] == self.args.max_steps
        if last or step % self.args.logging_steps == 0 or any(key.startswith("eval/") for key in metrics):
            self.write(metrics)
        if ranks.rank() == 0 and self.args.save_completions_steps and (last or step % self.args.save_completions_steps == 0):
            path = own_folder(self.run_dir / "completions") / f"step-{step:06d}.jsonl"
            remove(path)  # a resumed run writes its steps again
            values = [None] * len(samples) if advantages is None else advantages.tolist()
            append_jsonl(path, (
                {"prompt": sample.problem["prompt"], "answer": sample.problem["answer"], "completion": sample.text, "ended": sample.ended,
                 "reward": sample.reward, "advantage": value}
                | ({"prefix": sample.problem["prefix"]} if sample.problem.get("prefix") else {}) for sample, value in zip(samples, values)))
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
                            f"checkpoint-{metrics['step']} has the weights, which these steps did not touch")
        return None

    def headline(self, metrics):
        """The few numbers of the progress bar."""
        evaluated = {printable(key.removeprefix("eval/")): f"{value:.2f}"
                     for key, value in self.last.items() if re.fullmatch(r"eval/.*/avg@\d+", key)}
        shown = {"reward": "reward", "zero_std": "frac_reward_zero_std", "loss": "loss"}
        shown |= {"skipped": "skipped_updates"} if metrics["skipped_updates"] else {}
        return {label: f"{metrics[name]:.2f}" for label, name in shown.items() if name in metrics} | evaluated

    def finish(self):
        """Print the evaluation before and after, draw the curve, and say where everything is; rank 0 does."""
        if ranks.rank():
            return
        for key in self.last:
            if re.fullmatch(r"eval/.*/avg@\d+", key) and key in self.first and key + "_se" in self.last:
                print(f"{printable(key):<20} {self.first[key]:6.3f} -> {self.last[key]:6.3f} +- {self.last[key + '_se']:.3f}")
        plot_curve(self.run_dir)
        if self.report is not None:
            _, close, *_ = self.close.detach()
            close(0)
        print(f"the trained model and the records of the run are in {self.run_dir}")
