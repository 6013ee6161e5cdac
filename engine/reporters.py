"""The trackers that also get the metrics of a run (--report_to)."""

import os

from .errors import RunError, one_line
from .files import read_record


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
            shown = {flag: str(value) if isinstance(value, list) else value for flag, value in flags.items()}
            for summary in hparams(shown, {}):  # not add_hparams, which opens a folder of its own
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
