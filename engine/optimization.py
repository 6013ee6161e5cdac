"""One optimizer step: zeroed gradients, their sum over ranks, the clip, the step or its refusal, and the sums that metrics come from."""

import time
from collections import defaultdict

import torch
from tqdm import tqdm

from . import ranks


class Totals:
    """Loss, gradient norm and token sums over the micro-batches and optimizer steps of one `update`."""

    def __init__(self):
        self.began = time.perf_counter()
        self.step_loss = 0.0  # of the optimizer step at work, on this rank
        self.loss = self.grad_norm = 0.0
        self.updates = self.skipped = 0
        self.sums, self.counts = defaultdict(float), defaultdict(int)

    def add(self, loss, sums):
        """Add a micro-batch: its share of the loss () and {metric: (sum, count)}."""
        self.step_loss += loss.item()
        for name, (value, count) in sums.items():
            self.sums[name] += value.item()
            self.counts[name] += count.item()

    def metrics(self):
        """Means over optimizer steps, and over the tokens of all ranks; NaN for a metric without a token, none where no row is trained."""
        sums, counts = ranks.sum_over_ranks(self.sums), ranks.sum_over_ranks(self.counts)
        means = {name: sums[name] / count if count else float("nan") for name, count in counts.items()}
        return {"loss": self.loss / self.updates, "grad_norm": self.grad_norm / self.updates, "skipped_updates": self.skipped,
                "time/update": time.perf_counter() - self.began} | means


def token_sums(prefix, tokens, **values):
    """{prefix/name: (sum, count)} of each of `values` (B, T) over the True positions of `tokens` (B, T), for `Totals.add`."""
    return {f"{prefix}/{name}": (value.detach().expand_as(tokens)[tokens].sum(), tokens.sum()) for name, value in values.items()}


def zero_grad(model):
    """Zeros, not None: AdamW must take its momentum step even when no row has a gradient (tests/test_invariance.py).

    Gradients of whole weights are views of one tensor, so that one collective call sums them (`ranks.clip_grad_norm`).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None  # first, so that old and new ones are not held at once
    if ranks.is_sharded(model):
        zeros = map(torch.zeros_like, trained)
    else:
        zeros = trained[0].new_zeros(sum(map(torch.numel, trained))).split([parameter.numel() for parameter in trained])
    for parameter, gradient in zip(trained, zeros):
        parameter.grad = gradient.view_as(parameter)


def optimizer_step(model, optimizer, totals, args):
    """Sum the gradients over ranks, clip them to --max_grad_norm and step; skip the step when loss or gradient is not finite."""
    norm = ranks.clip_grad_norm(model, args.max_grad_norm)
    loss = ranks.sum_over_ranks(torch.tensor(totals.step_loss, dtype=torch.float64, device=norm.device)).item()
    totals.step_loss = 0.0
    totals.loss += loss
    totals.grad_norm += norm.item()
    totals.updates += 1
    if torch.isfinite(norm + loss):  # the same on every rank
        optimizer.step()
    else:  # weights and moments stay as if this step had not been due (tests/test_faults_numbers.py)
        totals.skipped += 1
        tqdm.write(f"the loss is {loss}, the gradient norm {norm.item()}: this optimizer step is skipped")
