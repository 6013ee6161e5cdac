"""The ledger of FLOPs: what sampling, training and collecting traces have cost."""

from collections import defaultdict
from dataclasses import dataclass, field

from .data import traces_file
from .trace_ledger import traces_flops


@dataclass
class Flops:
    """Ledger of the matmul FLOPs that a run has spent on sampling and training; evaluation is not charged.

    A forward pass over one sequence of D real tokens costs 2 N D for the weights plus 2 L A D^2 for causal attention. N counts the
    parameters without the input embedding, the head once. L layers have total head width A; half of the D x D square is computed.
    A backward pass costs twice its forward pass. Padding is free: it is our waste, not the method's. Rows that share the computation
    of their prompt get no discount. Sampling counts prompt and completion once per row. The stage `paper` follows the rule of the
    PrefixRL paper (arXiv 2601.18795): 2 N D for every sampled row and 6 N D for every row and update, with N all parameters, as if
    nothing were ever skipped.
    """

    parameters: int = 0
    weights: int = 0
    layers: int = 0
    attention_width: int = 0
    num_tokens: int = 0
    spent: dict = field(default_factory=lambda: defaultdict(float, {"rollout": 0.0, "train": 0.0, "traces": 0.0, "paper": 0.0}))

    @classmethod
    def of(cls, model, args=None, stages=()):
        """The ledger for `model`: zero, except what collecting the --traces of `args` has cost. stages: what else the method charges."""
        config = model.config.get_text_config()
        parameters = model.num_parameters()
        tied = model.get_output_embeddings() is None or model.get_output_embeddings().weight is model.get_input_embeddings().weight
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        weights = parameters if tied else parameters - model.get_input_embeddings().weight.numel()
        ledger = cls(parameters, weights, config.num_hidden_layers, heads * head_dim)
        ledger.spent |= dict.fromkeys(stages, 0.0)
        if traces_file(args) is not None:
            ledger.spent["traces"], ledger.spent["paper"] = traces_flops(traces_file(args))
        return ledger

    def forward(self, lengths):
        """FLOPs of one forward pass over sequences of the given token counts."""
        return sum(2 * self.weights * d + 2 * self.layers * self.attention_width * d * d for d in lengths)

    def add(self, stage, lengths, passes=1):
        """Charge `passes` forward-equivalents (a training pass is 3) over sequences of `lengths` (B,) tokens to a stage."""
        self.spent[stage] += passes * self.forward(lengths.tolist())

    def add_sampled(self, stage, lengths):
        """Charge the sampling of sequences of `lengths` (B,) tokens, prompt and completion, by both rules."""
        self.num_tokens += int(lengths.sum())
        self.add(stage, lengths)
        self.add_prefixrl_rule(lengths, passes=1)

    def add_prefixrl_rule(self, lengths, passes):
        """Charge 2 N D a forward-equivalent, the rule of the PrefixRL paper."""
        self.spent["paper"] += passes * 2 * self.parameters * int(lengths.sum())

    def metrics(self):
        """FLOPs by stage and in total, and tokens sampled (prompt and completion), since the start of the run."""
        total = sum(value for stage, value in self.spent.items() if stage != "paper")
        return {f"flops/{stage}": value for stage, value in self.spent.items()} | {"flops/total": total, "num_tokens": self.num_tokens}
