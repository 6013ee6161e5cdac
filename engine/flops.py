"""The ledger of FLOPs: what sampling, training and collecting traces have cost."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from .models import body
from .trace_ledger import traces_flops
from .traces import traces_file


@dataclass
class Flops:
    """Ledger of the matmul FLOPs that a run has spent on sampling and training; evaluation is not charged.

    A forward pass over one sequence of D real tokens costs 2 N D for the weights plus 2 L A D^2 for causal attention. N counts the
    parameters without embeddings, the head once, and of experts the share that runs. L layers that attend have mean head width A; half
    of the D x D square is computed, windows are not subtracted, and recurrent layers cost their weights (results/families.md).
    A backward pass costs twice its forward pass, for the gradients of inputs and of weights; a frozen weight (--lora_rank) needs only the
    former, 2 N D less. Padding is free: it is our waste, not the method's. Rows that share the computation
    of their prompt get no discount. Sampling counts prompt and completion once per row. The stage `paper` follows the rule of the
    PrefixRL paper (arXiv 2601.18795): 2 N D for every sampled row and 6 N D for every row and update, with N all parameters, as if
    nothing were ever skipped.
    """

    parameters: int = 0
    weights: int = 0
    frozen: int = 0
    layers: int = 0
    attention_width: int = 0
    num_tokens: int = 0
    spent: dict = field(default_factory=lambda: defaultdict(float, {"rollout": 0.0, "train": 0.0, "traces": 0.0, "paper": 0.0}))

    @classmethod
    def of(cls, model, args=None, stages=()):
        """The ledger for `model`: zero, except what collecting the --traces of `args` has cost. stages: what else the method charges."""
        widths = [heads * head_dim for heads, head_dim, _ in attention_layers(model)]
        ledger = cls(model.num_parameters(), *weights_of_a_token(model), len(widths), int(sum(widths) / max(1, len(widths))))
        ledger.spent |= dict.fromkeys(stages, 0.0)
        if traces_file(args) is not None:
            ledger.spent["traces"], ledger.spent["paper"] = traces_flops(traces_file(args))
        return ledger

    def forward(self, lengths):
        """FLOPs of one forward pass over sequences of the given token counts."""
        return sum(2 * self.weights * d + 2 * self.layers * self.attention_width * d * d for d in lengths)

    def add(self, stage, lengths, passes=1):
        """Charge `passes` forward-equivalents over sequences of `lengths` (B,) tokens to a stage: 3, or 4, of them are a training pass."""
        self.spent[stage] += passes * self.forward(lengths.tolist()) - (2 * self.frozen * int(lengths.sum()) if passes >= 3 else 0)

    def add_sampled(self, stage, lengths):
        """Charge the sampling of sequences of `lengths` (B,) tokens, prompt and completion, by both rules."""
        self.num_tokens += int(lengths.sum())
        self.add(stage, lengths)
        self.add_paper_rule(lengths, passes=1)

    def add_paper_rule(self, lengths, passes):
        """Charge 2 N D a forward-equivalent, the rule of the PrefixRL paper."""
        self.spent["paper"] += passes * 2 * self.parameters * int(lengths.sum())

    def metrics(self):
        """FLOPs by stage and in total, and tokens sampled (prompt and completion), since the start of the run."""
        total = sum(value for stage, value in self.spent.items() if stage != "paper")
        return {f"flops/{stage}": value for stage, value in self.spent.items()} | {"flops/total": total, "num_tokens": self.num_tokens}


def attention_layers(model):
    """(heads, their width, heads of keys and values) of every layer that attends, windows included, recurrent layers not."""
    config, layers = model.config.get_text_config(), []
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    for kind, layer in zip(kinds, config.per_layer_config):
        heads = getattr(layer, "num_attention_heads", None)
        if heads and (kind == "hybrid" or "attention" in kind and kind != "linear_attention"):
            width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
            if getattr(layer, "qk_nope_head_dim", None):  # latent attention: the mean of its queries' and values'
                width = (layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim) / 2
            layers.append((heads, width, getattr(layer, "num_key_value_heads", None) or heads))
    return layers


def weights_of_a_token(model):
    """(parameters that a token of text is multiplied by, those of them that are frozen).

    They are those of the language model and its head, without embeddings, and of experts the share that runs.
    """
    config, decoder = model.config.get_text_config().per_layer_config[0], model.get_decoder()

    def first(*names):  # families have different names for the same number
        return next((value for name in names if (value := getattr(config, name, None)) is not None), 0)

    num_experts = first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    running = first("num_experts_per_tok", "top_k_experts", "moe_topk") or num_experts
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head, total, trained = model.get_output_embeddings().weight, 0, 0
    for name, parameter in [("head", head), *(body(model) if decoder is model else decoder).named_parameters()]:
        if id(parameter) not in embeddings or name == "head":
            routed = num_experts and (".experts." in name or parameter.dim() == 3 and len(parameter) == num_experts)
            size = parameter.numel() * running // num_experts if routed else parameter.numel()
            total, trained = total + size, trained + size * parameter.requires_grad
    return total, total - trained
