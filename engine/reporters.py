"""What else gets the metrics of a run: a tracker (--report_to) and a picture of the learning curve."""

import os
import re

from .errors import RunError, one_line, printable
from .files import read_record, remove, writing
from .run_folder import read_metrics


def open_reporter(name, run_dir, purge_step=None):
    """Begin the record of a run in tensorboard, wandb or trackio, or go on with it after resuming: two functions (log, close).

    log(values, step) takes the values of a line of metrics.jsonl. close(exit_code) may be called more than once. The run's flags are the
    record's config, and the run_id keeps the record one. purge_step: the first step that a resumed run writes again. Only tensorboard
    can take it back; the others have it twice, or keep the first. Raises RunError, in one line.
    """
    record = read_record(run_dir / "args.json", {})
    flags, run_name, project = record["args"], f"{run_dir.name}-{record['run_id'][:8]}", run_dir.resolve().parent.name
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            writer = SummaryWriter(run_dir, purge_step=purge_step)
            for summary in hparams(flags, {}):  # not add_hparams, which opens a folder of its own
                writer.file_writer.add_summary(summary)

            def log(values, step):
                for metric, value in values.items():
                    writer.add_scalar(metric, value, step)
                writer.flush()
            return log, lambda exit_code: writer.close()
        if name == "wandb":
            import wandb

            run = wandb.init(project=os.environ.get("WANDB_PROJECT", project), name=run_dir.name, id=record["run_id"], resume="allow",
                             config=flags, dir=run_dir)
            return run.log, lambda exit_code: run.finish(exit_code)
        import trackio

        run = trackio.init(project=project, name=run_name, resume="allow", config=flags)
        return run.log, lambda exit_code: run.finish()
    except Exception as error:  # wandb without a login, say; they raise anything
        raise RunError(f"--report_to {name}: {one_line(error)}") from error


def plot_curve(run_dir):
    """Draw curve.png, training reward and evaluation accuracy by step, from metrics.jsonl; without matplotlib print a hint."""
    try:
        import matplotlib
    except ImportError:
        print("no curve.png: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(run_dir)
    keys = ["reward", *sorted({key for record in records for key in record if re.fullmatch(r"eval/.*/avg@\d+", key)})]
    series = {"training reward" if key == "reward" else key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
              for key in keys}
    if not any(series.values()):
        print("no curve.png: nothing was sampled and nothing evaluated")
        return
    matplotlib.rcParams["text.parse_math"] = False  # a difficulty is text, also with dollars in it
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for label, points in series.items():
        if points:
            axes.plot(*zip(*points), label=printable(label), alpha=0.5 if label == "training reward" else 1.0,
                      marker="." if "eval" in label else None)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(-0.03, 1.03))
    axes.xaxis.get_major_locator().set_params(integer=True)  # no step 0.5
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    beside = run_dir / ".curve.png.tmp"
    with writing(run_dir / "curve.png", beside):
        remove(beside)
        figure.savefig(beside, dpi=150, format="png")
        os.replace(beside, run_dir / "curve.png")
    pyplot.close(figure)
