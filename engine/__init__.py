"""The machine that no paper changes. A script uses the names below; engine/ imports neither a script nor common.py, and names no method."""

from .command_line import parse_args
from .errors import BadArgument, RunError
from .flags import Args, ModelArgs, TraceArgs, arg
from .models import load_policy
from .optimization import Totals, optimizer_step, token_sums, zero_grad
from .run import Run, launch
from .sampling import pad
from .scoring import Rows, compute_logps, micro_batches, minibatches, policy_logps

__all__ = [
    "Args", "BadArgument", "ModelArgs", "Rows", "Run", "RunError", "Totals", "TraceArgs", "arg", "compute_logps", "launch", "load_policy",
    "micro_batches", "minibatches", "optimizer_step", "pad", "parse_args", "policy_logps", "token_sums", "zero_grad"]
