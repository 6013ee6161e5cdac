"""Fixtures: every test starts from the shipped tiny model or a model built from a config."""

import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import common
import engine
import grpo
from engine import files, models, report, sampling, tasks
from faults import cut_run, finished  # noqa: F401 (fixtures)
from methods import with_eos


@pytest.fixture(autouse=True)
def claims():
    """No claim on a file outlives its test, as none outlives its process."""
    yield
    files.release(failed=False)


@pytest.fixture
def tiny():
    """(model, tokenizer) of the shipped base, fresh for each test."""
    return models.load_model("tiny_model")


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
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _, _ in triples]
        padded = engine.pad(prompts, [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for _, text, _ in triples], tokenizer, "cpu")
        rewards = torch.tensor([float(reward) for _, _, reward in triples])
        return grpo.Batch(*padded, loss_mask=padded[-1], advantages=grpo.group_advantages(rewards, num_generations, scale_rewards))

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
def with_report():
    """For a test whose runs write report.html."""


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path, request):
    """Run a script's main in this process, in an empty folder: run_script(grpo, "--flag", ...) -> (exit code, stdout, stderr).

    A run ends without report.html, which takes longer than a step, unless the test asks for `with_report`.
    """
    monkeypatch.chdir(tmp_path)
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr(report, "write_report", lambda folders: None)

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        code = 0
        try:
            engine.launch(module.main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def sampler(monkeypatch, tiny):
    """Replace sampling: sampler([texts or id lists of the first call], ...) -> list that gets each call's prompts as id lists.

    A text is given its EOS, an id list is taken as it is. A call more than was foreseen fails.
    """
    def install(*calls):
        prompts, left = [], iter(calls)

        def generate(model, prompt_ids, prompt_mask, eos_ids, pad_id, *rest):
            prompts.append([ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask)])
            drawn = [with_eos(tiny[1], row) if isinstance(row, str) else row for row in next(left)]
            assert len(drawn) == len(prompts[-1])
            completion_ids = sampling.right_pad([torch.tensor([ids]) for ids in drawn], pad_id)
            return completion_ids, sampling.completion_mask(completion_ids, eos_ids)

        monkeypatch.setattr(common, "generate", generate)
        return prompts

    return install


@pytest.fixture
def refused(run_script, tmp_path):
    """refused(module, *flags) -> the error of a script that ends with one line and exit code 2, and leaves its folder as it was."""
    def call(module, *flags):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        code, _, err = run_script(module, "--max_steps", 1, "--prompts_per_step", 2, "--eval_steps", 0, *flags)
        line = err.strip().splitlines()[-1]
        assert code == 2 and "Traceback" not in err and line.startswith(f"{module.__name__}.py: error: ")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        return line

    return call
