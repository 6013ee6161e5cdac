"""Fixtures: no test may reach a hub, and every test starts from the shipped tiny model or a model built from a config."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import common
import grpo
import runs
import tasks


@pytest.fixture
def tiny():
    """(model, tokenizer) of the shipped base, fresh for each test."""
    return common.load_model("tiny_model")


@pytest.fixture
def byte_tokenizer():
    """One byte, one token, with a BOS and pad = eos: any cut may fall into the middle of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left",
                                   clean_up_tokenization_spaces=False)


@pytest.fixture
def batch_of(tiny):
    """Build a Batch from texts: batch_of([(prompt, completion, reward), ...], num_generations) with real tokens and advantages."""
    model, tokenizer = tiny

    def build(triples, num_generations, scale_rewards="group"):
        prompt_ids, prompt_mask = common.left_pad([tokenizer(p)["input_ids"] for p, _, _ in triples], tokenizer.pad_token_id, "cpu")
        completions = [torch.tensor([tokenizer(c)["input_ids"] + [tokenizer.eos_token_id]]) for _, c, _ in triples]
        completion_ids = common.right_pad(completions, tokenizer.pad_token_id)
        mask = common.completion_mask(completion_ids, common.eos_ids(model, tokenizer))
        rewards = torch.tensor([float(reward) for _, _, reward in triples])
        advantages = grpo.group_advantages(rewards, num_generations, scale_rewards)
        ended = torch.ones(len(triples), dtype=torch.bool)
        return grpo.Batch(prompt_ids, prompt_mask, completion_ids, mask, ended, rewards, advantages, None)

    return build


@pytest.fixture
def mixed_triples():
    """8 rows in 2 groups of 4, lengths 5 to 60 tokens, rewards that differ within both groups."""
    triples = []
    for task, difficulty in (("bills", "easy"), ("diary", "hard")):
        row = tasks.problems(task, "train", difficulty, 1, seed=3)[0]
        other = tasks.problems(task, "train", "easy", 1, seed=4)[0]
        triples += [(row["prompt"], row["own_trace"], 1), (row["prompt"], row["teacher_trace"], 0),
                    (row["prompt"], other["own_trace"], 0), (row["prompt"], "\\boxed{ 3 }", 1)]
    return triples


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Run a script's main in this process, in an empty folder: run_script(grpo, "--flag", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        code = 0
        try:
            runs.run_main(module.main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
