"""The life of a run: set-up, the loop of steps, evaluation, checkpoints, and its end."""

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from . import ranks
from .checkpoints import load_checkpoint, save_checkpoint, save_model
from .data import step_problems
from .dry_run import dry_run
from .errors import BadArgument, RunError, one_line, printable
from .explain import explained_steps
from .files import release
from .flops import Flops
from .models import check_positions, seed_everything, weights_digest
from .rollouts import score_tokens
from .run_folder import open_run
from .run_log import RunLog, due
from .self_check import self_check
from .streams import unbreakable_output

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


class Interrupted(Exception):
    """(number of a signal, text): it ended a run after a step. One line on stderr, exit code 128 + the number."""


class Run:
    """One training run: its folder, optimizer, ledger of FLOPs, evaluation, checkpoints and log.

    evaluate(model, tokenizer, eval_problems, args) returns metrics. stages: what the method samples beside the rollout, one completion
    a group, for the ledger. trace_rows: rows of a group that are traces. With --dry_run a plan is printed, and there are no steps;
    with --explain there are steps until one has a signal, and no folder.
    """

    def __init__(self, args, script, model, tokenizer, train_problems, eval_problems, evaluate, stages=(), trace_rows=0):
        self.args, self.model, self.tokenizer, self.train_problems = args, model, tokenizer, train_problems
        self.flops = Flops.of(model, args, stages)
        check_positions(model, args, [*train_problems, *eval_problems], trace_rows, stages)
        if args.dry_run:
            return dry_run(args, model, tokenizer, train_problems, eval_problems, self.flops, stages, trace_rows)
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        # Eval mode has no dropout or router noise under any name. Recomputed activations need train mode; self_check refuses its noise.
        model.train(args.gradient_checkpointing)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.scheduler = transformers.get_scheduler(args.lr_scheduler_type, self.optimizer, args.warmup_steps, args.max_steps)
        base = weights_digest(model)  # before those of a checkpoint take their place
        self.start = load_checkpoint(args.resume_from_checkpoint, model, self.optimizer, self.scheduler, self.flops)
        if self.start > args.max_steps:
            raise BadArgument(f"--max_steps {args.max_steps} is less than the {self.start} steps of --resume_from_checkpoint "
                              f"{args.resume_from_checkpoint}")
        self.script = script
        if args.explain:
            return
        self.dir = open_run(args, script, base, train_problems, eval_problems, self.start)
        self.log = RunLog(self.dir, args)
        self.stop, self.saved = None, False  # why the run ends early, a signal's number or a RunError; is this step in a checkpoint?
        self_check(model, tokenizer, train_problems, args)
        self.evaluates = bool(eval_problems)
        self.evaluate = lambda: evaluate(model, tokenizer, eval_problems, args) if eval_problems else {}
        if self.start == 0 and eval_problems:
            self.log.write({"step": 0} | self.evaluate())

    def steps(self):
        """Yield (step from 1, its N problems); afterwards save the model.

        The first Ctrl-C, SIGTERM or SIGHUP stops the run after the current step and its checkpoint. A second one stops the run at once. A
        checkpoint is always that of a whole step. After it Interrupted is raised, or the RunError of a run that went wrong.
        """
        args = self.args
        if args.dry_run:
            return
        if args.explain:
            yield from explained_steps(self)
            return
        self.catch_signals()
        solved = "solved: of the held-out problems, at the latest evaluation" if self.evaluates else "no evaluation, as none was asked for"
        print(f"{args.max_steps - self.start} steps of {args.prompts_per_step} prompts; {solved}; "
              "no signal: all rewards of a group are equal")
        if (num := len(self.train_problems)) < args.prompts_per_step:
            print(f"note: --prompts_per_step {args.prompts_per_step} is more than the {num} training rows: a step repeats them")
        self.bar = tqdm(range(self.start, args.max_steps), "training", args.max_steps, initial=self.start, disable=ranks.rank() > 0,
                        bar_format="{desc}: step {n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}")
        for step in self.bar:
            self.began = time.perf_counter()
            seed_everything(args.seed, step)
            yield step + 1, step_problems(self.train_problems, args.prompts_per_step, args.seed, step)
            if self.saved and self.stops_on_some_rank():  # a signal may have come during the save
                raise self.stop if isinstance(self.stop, RunError) else Interrupted(
                    self.stop, f"interrupted after step {step + 1}; go on with: {self.command_to_resume()}")
        save_model(self.dir, self.model, self.tokenizer, self.args.save_merged)
        self.log.finish()

    def record(self, step, samples, metrics, advantages=None):
        """End a step: next learning rate, evaluation, log and checkpoint, each when it is due.

        samples: the B trained ones, for completions/; advantages (B,); metrics: those of rollout and update.
        """
        args = self.args
        self.optimizer.zero_grad()  # sampling and evaluation need the memory of the gradients
        if args.explain:
            return self.scheduler.step()
        metrics = {"step": step, "learning_rate": self.scheduler.get_last_lr()[0]} | metrics
        self.scheduler.step()
        step_time = time.perf_counter() - self.began
        metrics |= {"step_time": step_time, "time/rollout": step_time - metrics["time/update"]} | self.flops.metrics()
        if due(step, args.eval_steps, args):
            metrics |= self.evaluate()
        tokens = score_tokens(self.model, self.tokenizer, samples, args) if due(step, args.save_completions_steps, args) else None
        self.stop = self.log.step(metrics, samples, advantages, tokens) or self.stop
        self.bar.set_postfix_str(self.log.headline(metrics))
        self.saved = self.stops_on_some_rank() or due(step, args.save_steps, args)
        if self.saved:
            save_checkpoint(self.dir, step, self.model, self.tokenizer, self.optimizer, self.flops, args.save_total_limit)

    def catch_signals(self):
        """Let the first signal ask for an end after the step; the next one is the system's."""
        caught = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # ignored under nohup

        def ask(number, _):
            self.stop = self.stop or number
            for each in caught:  # the system ends the process, even where Python waits in a kernel
                signal.signal(each, signal.SIG_DFL)
            with contextlib.suppress(OSError):  # not print, which may be at work below this handler
                ranks.rank() or os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once, without\n")

        for number in caught:
            signal.signal(number, ask)

    def stops_on_some_rank(self):
        """Does the run end early? All ranks agree on it, and on why, at the same places of a step."""
        agreed = next((stop for stop in ranks.all_gather_list([self.stop]) if stop is not None), None)
        if agreed is not None:  # a signal that came while the ranks gathered stays for the next time
            self.stop = agreed
        return agreed is not None

    def command_to_resume(self):
        """The command that goes on with this run; flags that run code must be given again."""
        many = ["torchrun", f"--nproc_per_node={ranks.world_size()}"]
        words = [*(many if ranks.world_size() > 1 else ["python"]), sys.argv[0], "--resume_from_checkpoint", str(self.dir)]
        words += ["--trust_remote_code"] * self.args.trust_remote_code
        return shlex.join(words + (["--reward_fn", self.args.reward_fn] if self.args.reward_fn else []))


def launch(main):
    """Call `main` and turn its errors into one line and an exit code: 2 bad arguments, 1 run time, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.

    Under torchrun every rank calls it. Rank 0 prints the errors that all ranks meet. Output that cannot be written is lost.
    """
    with contextlib.ExitStack() as stack:
        for number in STOP_SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        stack.push(lambda error, *_: release(failed=error is not None))
        stack.enter_context(unbreakable_output())
        code = exit_code(main, Path(sys.argv[0]).name)
        if code:
            sys.exit(code)


def exit_code(main, name):
    """Call `main`, print how it failed, and return the exit code."""
    try:
        ranks.start()
        main()
        ranks.finish()
        return 0
    except (BadArgument, RunError, OSError) as error:  # its words may be a file's; OSError: a disk or a folder that is no longer there
        if ranks.rank() == 0 or not isinstance(error, BadArgument):
            print(f"{name}: error: {printable(str(error))}" + (f" (rank {ranks.rank()})" if ranks.rank() else ""), file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1
    except (RuntimeError, MemoryError) as error:  # on a GPU OutOfMemoryError; on a CPU torch has no type of its own
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print(f"{name}: error: rank {ranks.rank()} is out of memory; docs/faq.md, question 3, says what to lower: {one_line(error)}",
              file=sys.stderr)
        return 1
    except Interrupted as error:
        number, words = error.args
        if ranks.rank() == 0:
            print(f"{name}: {words}", file=sys.stderr)
        ranks.finish()  # the ranks have agreed to stop
        return 128 + number
    except KeyboardInterrupt:  # outside `Run.steps`
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
