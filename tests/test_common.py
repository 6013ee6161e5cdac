"""Does each helper that the scripts take on trust do what it says?"""

import json
import types

import pytest
import torch

import common
import engine
import grpo
from engine import checkpoints, data, errors, files, models, run_folder, sampling, scoring, self_check, tasks
from engine.flops import Flops


def test_left_pad():
    ids, mask = sampling.left_pad([[1, 2, 3], [4]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[True] * 3, [False, False, True]]


def rows_of(prompts, completions):
    """Rows of these prompt and completion lengths; prompts of one length are the same."""
    prompt_ids, prompt_mask = sampling.left_pad([[7] * length for length in prompts], 0, "cpu")
    completion_mask = torch.arange(max(completions)) < torch.tensor(completions)[:, None]
    return engine.Rows(prompt_ids, prompt_mask, completion_mask.long(), completion_mask)


def bound(tokens):
    return types.SimpleNamespace(micro_batch_tokens=tokens)


def test_micro_batches_hold_every_row_once_and_keep_the_budget(tiny):
    prompts, completions = torch.tensor([2, 40, 3, 10, 45, 1, 150]), torch.tensor([3, 10, 40, 10, 4, 1, 50])
    batch, every = rows_of(prompts.tolist(), completions.tolist()), torch.arange(7)
    batches = engine.micro_batches(tiny[0], batch, every, bound(100))
    assert sorted(torch.cat(batches).tolist()) == list(range(7))
    assert batches[0].tolist() == [6]  # over the budget on its own
    assert all(len(rows) * int(prompts[rows].max() + completions[rows].max()) <= 100 for rows in batches[1:])
    assert max(map(len, batches)) > 1
    assert [len(rows) for rows in engine.micro_batches(tiny[0], batch, every, bound(1))] == [1] * 7
    assert sorted(torch.cat(engine.micro_batches(tiny[0], batch, every[3:6], bound(100))).tolist()) == [3, 4, 5]
    assert engine.micro_batches(tiny[0], batch, every[:0], bound(100)) == []


def test_micro_batches_keep_rows_of_a_long_prompt_together(tiny):
    """Two groups of four: with long prompts whole groups, which share them; with short ones rows of like length."""
    order = {width: [rows.tolist() for rows in engine.micro_batches(
        tiny[0], rows_of([width, width + 1] * 4, [8, 8, 9, 9, 30, 30, 31, 31]), torch.arange(8), bound(tokens))]
        for width, tokens in ((1, 140), (200, 330))}
    assert [sorted(rows) for rows in order[200]] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert [sorted(rows) for rows in order[1]] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    tokens = engine.micro_batches(tiny[0], rows_of([200] * 8, [10] * 8), torch.arange(8), bound(280))
    assert [len(rows) for rows in tokens] == [8]  # 200 + 8 x 10 tokens are computed


def test_some_rows_of_a_batch_are_trimmed_and_no_rows_are_one_masked_token():
    batch = rows_of([2, 5, 3], [4, 1, 2])
    some = batch[torch.tensor([2, 0])]
    assert some.prompt_ids.tolist() == [[7, 7, 7], [0, 7, 7]] and some.prompt_mask.tolist() == [[True] * 3, [False, True, True]]
    assert some.completion_mask.tolist() == [[True, True, False, False], [True] * 4] and some.lengths.tolist() == [5, 6]
    none = batch[torch.tensor([], dtype=torch.int64)]
    assert none.prompt_mask.tolist() == [[True, True]] and none.completion_mask.tolist() == [[False]]


def test_prompts_and_completions_are_padded_by_position_also_where_pad_is_a_token():
    """Padding on the outside of both; an EOS whose id is that of the padding, and a completion without one, keep their tokens."""
    padded = engine.pad([[5, 9], [6]], [[7, 9], [9, 7, 8]], types.SimpleNamespace(pad_token_id=9), "cpu")
    assert [part.tolist() for part in padded] == [
        [[5, 9], [9, 6]], [[True, True], [False, True]], [[7, 9, 9], [9, 7, 8]], [[True, True, False], [True] * 3]]


class FakeTokenizer:
    """Just what encode_prompt needs: adds BOS (id 0) by default, as Llama's tokenizers do."""

    bos_token_id, chat_template = 0, None

    def __init__(self, adds_bos):
        self.adds_bos = adds_bos

    def __call__(self, text, add_special_tokens=True):
        ids = [0 if word == "<s>" else 7 for word in text.split()]
        return {"input_ids": [0] * (add_special_tokens and self.adds_bos) + ids}


def test_bos_exactly_once():
    assert common.encode_prompt(FakeTokenizer(True), "a b") == [0, 7, 7]
    assert common.encode_prompt(FakeTokenizer(True), "<s> a b") == [0, 7, 7]
    assert common.encode_prompt(FakeTokenizer(False), "a b") == [7, 7]


def test_templates(tiny):
    tokenizer = tiny[1]
    assert common.render_prompt(tokenizer, "hello") == "hello"
    with pytest.raises(engine.BadArgument, match="--template chat: the tokenizer has no chat template"):
        common.render_prompt(tokenizer, "hello", "chat")
    messages = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert common.render_prompt(tokenizer, "hello", system_prompt="be brief") == "<system> be brief <user> hello <assistant>"
    assert common.render_prompt(tokenizer, "hello", "none") == "hello"


def test_flops_of_the_tiny_llama_by_hand(tiny):
    """Weights: every matrix, norms and the tied head once; attention: 2 matmuls over half of the D x D square."""
    model = tiny[0]
    hidden, layers, mlp, vocabulary = 96, 3, 288, len(tasks.vocabulary())
    weights = layers * (4 * hidden * hidden + 3 * hidden * mlp + 2 * hidden) + hidden + vocabulary * hidden
    flops = Flops.of(model)
    assert (flops.weights, flops.parameters) == (weights, weights)
    one = 2 * weights * 10 + 2 * layers * hidden * 10 * 10
    assert flops.forward([10]) == one
    flops.add_sampled("rollout", torch.tensor([10, 10]))
    flops.add("train", torch.tensor([10]), passes=3)
    flops.add_paper_rule(torch.tensor([10]), passes=3)
    metrics = flops.metrics()
    assert metrics["flops/rollout"] == 2 * one and metrics["flops/train"] == metrics["flops/total"] - 2 * one == 3 * one
    assert metrics["flops/paper"] == 2 * weights * 20 + 6 * weights * 10 and metrics["num_tokens"] == 20
    assert "flops/rephrase" not in metrics and Flops.of(model, stages=("rephrase",)).metrics()["flops/rephrase"] == 0


def test_flops_rule_against_torchs_counter(tiny):
    """torch counts the matmuls it runs; the norms we count as weights and the other half of the attention square are the difference."""
    from torch.utils.flop_counter import FlopCounterMode

    model, length = tiny[0], 64
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.int64))
    ours = Flops.of(model)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    upper_half = 2 * ours.layers * ours.attention_width * length**2
    rotary = counter.get_total_flops() - (ours.forward([length]) - 2 * norms * length + upper_half)
    assert 0 <= rotary < 0.001 * counter.get_total_flops()


def test_untied_input_embedding_is_not_charged():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    flops = Flops.of(model)
    assert flops.parameters - flops.weights == 50 * 32


def test_step_problems_is_a_function_of_seed_and_step_and_visits_every_problem_once_an_epoch():
    rows = list(range(10))
    stream = [row for step in range(10) for row in data.step_problems(rows, 3, 0, step)]
    assert [sorted(stream[start : start + 10]) for start in (0, 10, 20)] == [rows] * 3
    assert stream[:10] != stream[10:20]
    assert data.step_problems(rows, 3, 0, 7) == stream[21:24]
    assert data.step_problems(rows, 3, 1, 7) != stream[21:24]


def test_encode_problems_drops_long_prompts_and_bad_gold_with_a_count(tiny, capsys):
    args = types.SimpleNamespace(template="auto", system_prompt=None, max_prompt_length=5, reward="numeric", reward_fn=None)
    rows = [{"prompt": "Q: 1", "answer": "3"}, {"prompt": "1 " * 6, "answer": "3"}, {"prompt": "Q: 2", "answer": "four\x1b[31m"}]
    assert [row["prompt"] for row in common.encode_problems(rows, tiny[1], args)] == ["Q: 1"]
    out = capsys.readouterr().out
    assert "dropped 1 of 3 prompts longer than --max_prompt_length 5" in out
    assert "dropped 1 of 3 rows whose gold answer does not grade right" in out and "\x1b" not in out
    with pytest.raises(engine.BadArgument, match="no prompt is left of 1"):
        common.encode_problems(rows[1:2], tiny[1], args)


def test_jsonl_is_strict_json_whatever_the_text(tmp_path):
    """Lone surrogates, NUL and escapes survive; NaN and infinity become null: a column of numbers stays one."""
    path = tmp_path / "m.jsonl"
    files.append_jsonl(path, [{"text": "\ud800\x00\x1b[2J\u202e", "loss": float("nan"), "grad_norm": float("inf")}])
    files.append_jsonl(path, [{"step": 2}])
    first, second = path.read_text().splitlines()
    assert json.loads(first, parse_constant=pytest.fail) == {"text": "\ud800\x00\x1b[2J\u202e", "loss": None, "grad_norm": None}
    assert first.isascii() and json.loads(second) == {"step": 2}


def test_printable_neutralises_terminal_escapes():
    assert errors.printable("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\\nc\\u202e"


def test_metrics_are_trimmed_to_a_step_and_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append_jsonl(path, [{"step": step, "reward": 0.1} for step in (0, 1, 2, 3)])
    with open(path, "a") as file:
        file.write('{"step": 4, "rew')
    assert [record["step"] for record in run_folder.read_metrics(tmp_path)] == [0, 1, 2, 3]
    run_folder.rewind(tmp_path, 2)
    assert path.read_text() == "".join(f'{{"step": {step}, "reward": 0.1}}\n' for step in (0, 1, 2))
    assert run_folder.read_metrics(tmp_path / "nowhere") == []


def test_checkpoint_round_trip_and_limit(tiny, tmp_path):
    model, tokenizer = tiny
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    flops = Flops.of(model)
    flops.add("rollout", torch.tensor([10]))
    for step in (2, 4, 10):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
        checkpoints.save_checkpoint(tmp_path, step, model, tokenizer, optimizer, flops, total_limit=2)
    (tmp_path / "checkpoint-12").mkdir()  # torn: no state.json
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]

    other, _ = models.load_model("tiny_model")
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    other_scheduler = torch.optim.lr_scheduler.LambdaLR(other_optimizer, lambda step: 1 / (step + 1))
    other_flops = Flops.of(other)
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint-10", other, other_optimizer, other_scheduler, other_flops) == 10
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)
        assert torch.equal(optimizer.state[ours]["exp_avg_sq"], other_optimizer.state[theirs]["exp_avg_sq"])
    assert other_scheduler.get_last_lr() == [1e-3 / 11] and other_flops == flops  # the schedule is a function of the step


def test_self_check_passes_on_the_base_and_stops_on_a_wrong_policy(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = [row | {"prompt_ids": common.encode_prompt(tokenizer, row["prompt"])} for row in tasks.problems("bills", "train", "easy", 8)]
    args = types.SimpleNamespace(seed=0, max_completion_length=64, temperature=0.7, logprob_impl="auto", reward_fn=None)
    numbers = self_check.self_check(model, tokenizer, rows, args)
    assert numbers["logp_difference"] < 1e-4 and numbers["ended"] > 0.5
    honest, forgetful = scoring.policy_logps, types.SimpleNamespace(temperature=1.0, logprob_impl="auto")
    monkeypatch.setattr(self_check, "policy_logps", lambda model, batch, args: honest(model, batch, forgetful))
    with pytest.raises(engine.RunError, match="self-check: LlamaForCausalLM scores its own samples"):
        self_check.self_check(model, tokenizer, rows, args)


def test_self_check_stops_on_a_head_that_the_tiled_path_does_not_know(tiny):
    """A model that scales its logits in a way of its own: tiled is refused with the way out, which works."""
    model, tokenizer = tiny
    rows = [row | {"prompt_ids": common.encode_prompt(tokenizer, row["prompt"])} for row in tasks.problems("bills", "train", "easy", 8)]
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 0.9 * logits)
    args = types.SimpleNamespace(seed=0, max_completion_length=64, temperature=1.0, logprob_impl="tiled", reward_fn=None)
    with pytest.raises(engine.RunError, match="LlamaForCausalLM .*: try --logprob_impl reference"):
        self_check.self_check(model, tokenizer, rows, args)
    args.logprob_impl = "reference"
    assert self_check.self_check(model, tokenizer, rows, args)["logp_difference"] < 1e-4


def test_a_gguf_file_is_the_model_that_was_written(tmp_path):
    """Tiny weights in llama.cpp's names and order, with a byte-level tokenizer: the same logits, and its own EOS."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                         rms_norm_eps=1e-6, max_position_embeddings=128, tie_word_embeddings=True))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in {"context_length": 128, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64, "head_count": 2,
                        "head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "vocab_size": 258, "rope_freq_base": 10000.0,
                        "tokenizer_model": "gpt2", "token_list": [*sorted(ByteLevel.alphabet()), "<eos>", "ab"], "token_merges": ["a b"],
                        "token_types": [1] * 256 + [3, 1], "eos_token_id": 256, "bos_token_id": 256}.items():
        getattr(writer, f"add_{name}")(value)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps the two halves of a rotary pair side by side
            value = value.view(2, 2, 8, 32).transpose(1, 2).reshape(32, 32)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(name, value.contiguous().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    loaded, tokenizer = models.load_model(str(tmp_path), gguf_file="m.gguf")
    ids = torch.tensor([tokenizer("cab")["input_ids"]], device=loaded.device)
    assert tokenizer.decode(ids[0]) == "cab" and ids[0, -1] == 257 and tokenizer.eos_token_id == 256 and loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(ids).logits, model.to(loaded.device)(ids).logits, rtol=0, atol=1e-6)
    with pytest.raises(engine.BadArgument, match="--model_name_or_path .*other.gguf"):
        models.load_model(str(tmp_path), gguf_file="other.gguf")


def test_rollout_metrics_by_hand():
    values = zip(("hard", "hard", "easy", "easy"), (3, 1, 2, 2), (True, True, True, False), (0.0, 1.0, 1.0, 1.0))
    samples = [common.Sample({"difficulty": level}, [], [7] * length, "", ended, reward) for level, length, ended, reward in values]
    metrics = common.rollout_metrics(samples, types.SimpleNamespace(num_generations=2, reward="boxed", reward_fn=None))
    assert metrics == {"reward": 0.75, "reward_std": 0.25, "frac_reward_zero_std": 0.5, "completions/mean_length": 2.0,
                       "completions/min_length": 1.0, "completions/max_length": 3.0, "completions/clipped_ratio": 0.25,
                       "reward/easy": 1.0, "reward/hard": 0.5}


def test_names_of_fresh_run_folders_do_not_collide(tmp_path, tiny, monkeypatch):
    import grpo

    monkeypatch.chdir(tmp_path)
    folders = {run_folder.open_run(grpo.Args(), "grpo.py", {}, [], []) for _ in range(3)}
    assert len(folders) == 3 and all((folder / "args.json").exists() for folder in folders)


@pytest.mark.parametrize("change", [
    lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(1 + 1e-6), lambda model: model.model.norm.weight.data[0].add_(1e-3),
    lambda model: setattr(model.model, "extra", torch.nn.Linear(2, 2))], ids=["a matrix", "an element", "a parameter more"])
def test_the_digest_of_the_weights_sees_a_change(tiny, change):
    before = models.weights_digest(tiny[0])
    assert models.weights_digest(models.load_model("tiny_model")[0]) == before
    change(tiny[0])
    assert models.weights_digest(tiny[0])["sha256"] != before["sha256"]


def test_a_prompt_without_a_token_is_dropped_with_a_count(tiny, capsys):
    args = types.SimpleNamespace(template="auto", system_prompt=None, max_prompt_length=5, reward="numeric", reward_fn=None)
    kept = common.encode_problems([{"prompt": prompt, "answer": "3"} for prompt in (" ", "1")], tiny[1], args)
    assert [row["prompt"] for row in kept] == ["1"]
    assert "--dataset_name: dropped 1 of 2 prompts in which the tokenizer finds no token" in capsys.readouterr().out


def test_a_prompt_of_exactly_the_longest_length_stays(tiny):
    args = types.SimpleNamespace(template="auto", system_prompt=None, max_prompt_length=5, reward="numeric", reward_fn=None)
    rows = [{"prompt": "1 " * length, "answer": "3"} for length in (5, 6)]
    assert [len(row["prompt_ids"]) for row in common.encode_problems(rows, tiny[1], args)] == [5]


def test_attention_and_threads_are_those_of_the_flags():
    model, _ = engine.load_policy(grpo.Args(attn_implementation="eager", threads=2))
    try:
        assert model.config._attn_implementation == "eager" and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_timeouts_are_counted(monkeypatch):
    monkeypatch.setattr(common, "math_timeouts", lambda: 3)
    sample = common.Sample({"difficulty": "all"}, [], [7], "", True, 1.0)
    args = types.SimpleNamespace(num_generations=1, reward="math", reward_fn=None)
    assert common.rollout_metrics([sample], args)["reward/timeouts"] == 3
