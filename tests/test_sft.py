"""Is SFT the cross-entropy of the traces' tokens, and a start for RL?"""

import json

import pytest
import torch

import grpo
import sft
from engine import tasks
from engine.flops import Flops
from methods import completions_of, loaded, prompts_of, with_eos


def test_loss_is_the_cross_entropy_of_trace_tokens_and_eos(tiny):
    """[SFT objective] each row alone and unpadded through the model, cross_entropy over all tokens of the step, and its gradient."""
    model, tokenizer = tiny
    args, problems = loaded(sft, tokenizer, num_hard=3, num_easy=2)
    unfinished = " ".join(problems[0]["trace"].split()[:5])  # its EOS is a surprise; that of a whole trace costs nothing
    problems[0] |= {"trace": unfinished, "trace_ids": with_eos(tokenizer, unfinished)}
    batch, samples, metrics = sft.rollout(model, tokenizer, problems)
    assert [sample.text for sample in samples] == [problem["trace"] for problem in problems]
    assert len({len(problem["trace_ids"]) for problem in problems}) > 1
    assert prompts_of(batch) == [problem["prompt_ids"] for problem in problems]
    assert completions_of(batch) == [problem["trace_ids"] for problem in problems]
    logits, labels = [], []
    for problem in problems:
        prompt, ids = problem["prompt_ids"], with_eos(tokenizer, problem["trace"])
        logits.append(model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
        labels += ids
    assert metrics == pytest.approx({"completions/mean_length": len(labels) / 5})
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels))
    gradient = torch.autograd.grad(expected, model.lm_head.weight)[0]
    args.max_grad_norm = 1e9
    args.micro_batch_tokens = 2 * int(batch.lengths.max())
    flops = Flops.of(model)
    metrics = sft.update(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, args, flops)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5) and expected.item() > 1
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, atol=1e-6, rtol=0)
    assert flops.spent["train"] == 3 * flops.forward(batch.lengths.tolist()) and flops.num_tokens == flops.spent["rollout"] == 0


def test_problems_without_a_trace_are_left_out(run_script, tmp_path, monkeypatch):
    problems = tasks.problems("bills", "train", "easy", 4)
    traces = [None, problems[1]["own_trace"], None, problems[3]["own_trace"]]
    records = [{"prompt": problem["prompt"], "answer": problem["answer"], "trace": trace} for problem, trace in zip(problems, traces)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    seen, rollout = [], sft.rollout
    monkeypatch.setattr(sft, "rollout", lambda *inputs: seen.append([problem["prompt"] for problem in inputs[2]]) or rollout(*inputs))
    code, _, err = run_script(sft, "--dataset_name", "mine.jsonl", "--max_steps", 1, "--prompts_per_step", 4, "--output_dir", "run")
    assert code == 0, err
    assert sorted(seen[0]) == sorted(2 * [problems[1]["prompt"], problems[3]["prompt"]])


def test_a_step_that_repeats_traces_is_told(run_script):
    """Three traces in a step of 64 cost 21 times as much as three in a step of three, and teach the same."""
    short = ("--num_hard", 2, "--num_easy", 1, "--max_steps", 1, "--eval_steps", 0)
    for num, told in ((4, True), (3, False)):
        _, out, _ = run_script(sft, *short, "--prompts_per_step", num, "--output_dir", num)
        assert (f"\nnote: --prompts_per_step {num} is more than the 3 training rows: a step repeats them\n" in out) == told


def test_every_usable_trace_of_a_problem_is_a_row(run_script, tmp_path, monkeypatch):
    problem = tasks.problems("bills", "train", "easy", 1)[0]
    texts = [problem["own_trace"], problem["teacher_trace"], "\\boxed{ 0 }"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": problem["prompt"], "trace": text}) + "\n" for text in texts))
    seen, rollout = [], sft.rollout
    monkeypatch.setattr(sft, "rollout", lambda *inputs: seen.append([problem["trace"] for problem in inputs[2]]) or rollout(*inputs))
    code, _, err = run_script(sft, "--num_hard", 0, "--num_easy", 1, "--traces", "t.jsonl", "--max_steps", 1, "--prompts_per_step", 2,
                              "--eval_steps", 0, "--output_dir", "run")
    assert code == 0 and sorted(seen[0]) == sorted(texts[:2]), err


def test_grpo_after_sft_starts_from_the_tuned_model(run_script, tmp_path):
    """The RL run's evaluation at step 0 is the SFT run's last one, and not its first."""
    shared = ("--task", "bills", "--num_hard", 12, "--num_easy", 0, "--eval_problems", 6)
    code, out, err = run_script(sft, *shared, "--max_steps", 8, "--prompts_per_step", 12, "--eval_steps", 8, "--output_dir", "sft")
    assert code == 0 and "traces: 12 of 12 problems have one (--trace_style teacher)" in out, err
    code, _, err = run_script(grpo, *shared, "--model", "sft", "--max_steps", 1, "--prompts_per_step", 2, "--output_dir", "rl")
    assert code == 0, err
    records = [json.loads(line) for run in ("sft", "rl") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
    first, last, start = ({key: value for key, value in records[i].items() if key.startswith("eval/")} for i in (0, 8, 9))
    assert records[9]["step"] == 0 and start == last != first and last["eval/hard/foreign"] > first["eval/hard/foreign"] + 0.5
    losses = [record["loss"] for record in records[1:9]]
    assert losses[0] > 2 and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("flags, expected", [
    (["--num_generations", "4"], "unknown flag --num_generations"),
    (["--beta", "0.1"], "unknown flag --beta"),
])
def test_flags_of_the_rl_scripts_are_refused(refused, flags, expected):
    assert expected in refused(sft, *flags)
