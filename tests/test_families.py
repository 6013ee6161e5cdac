"""Are the models of others sampled, scored and charged right, or else refused in one line? results/families.md has every family."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import engine
import families
import grpo
from engine import models, sampling, scoring
from engine.flops import Flops, attention_layers
from engine.self_check import self_check

ALIKE = ("--max_steps", 1, "--eval_steps", 0, "--num_hard", 8, "--num_easy", 0, "--prompts_per_step", 1, "--num_generations", 2)
# A kind each: learned positions, dropout as a plain number, no cache, multi-head latent attention, experts, per-layer widths, a
# language model in a larger one, sliding windows, recurrence, both, no attention, a base that is the model itself.
WORKING = ("gpt2", "opt", "openai-gpt", "deepseek_v3", "mixtral", "gemma4_text", "gemma3", "gemma2", "mamba", "qwen3_next", "llama4_text")
COUNTED = [family for family in WORKING if family not in ("qwen3_next", "llama4_text")]  # torch counts a recurrence, and idle experts


@pytest.fixture
def folder(tmp_path_factory):
    """A folder for a model, beside the one in which a script runs."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def saved(folder):
    """saved(family, **settings of the config) -> the folder of a small random model of it, with a tokenizer of words."""
    def save(family, **settings):
        config = families.small_config(family)
        for name, value in settings.items():
            setattr(config, name, value)
        families.save_small(config, folder, pad_is_eos=True)
        return folder

    return save


@pytest.fixture
def weights(saved):
    """weights(change) -> the folder of a Llama whose checkpoint `change` has edited."""
    def edit(change, family="llama"):
        folder = saved(family)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return edit


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", WORKING)
def test_a_family_is_sampled_scored_and_charged_right(family):
    row = families.examine(family, families.small_config(family))
    assert row["verdict"] == "works"
    assert max(row[name] for name in ("sampled", "padding", "train", "sharing")) < 1e-4
    assert family not in COUNTED or abs(row["FLOPs"] - 1) < 0.05  # norms and biases are counted as weights


@pytest.mark.parametrize("family, reason", [
    ("rwkv", "reads its padding"), ("recurrent_gemma", "reads its padding"), ("bart", "reads its padding"),
    ("bert", "a wrong mask"), ("xlstm", "takes no attention_mask"), ("xlm", "cannot be sampled and scored"),
    ("modernbert-decoder", "try --logprob_impl reference")])
def test_a_family_that_would_train_on_something_else_is_refused(family, reason):
    verdict = families.examine(family, families.small_config(family))["verdict"]
    assert verdict.startswith("refused: ") and reason in verdict and len(verdict.splitlines()) == 1
    assert ("--logprob_impl" in verdict) == ("--logprob_impl" in reason)


def test_another_path_of_log_probs_is_advised_only_where_it_helps(saved):
    model, tokenizer = models.load_model(str(saved("bert")))
    with pytest.raises(engine.RunError, match="a wrong mask, position or temperature does this$"):
        self_check(model.eval(), tokenizer, families.problems(tokenizer), grpo.Args(max_completion_length=8, logprob_impl="tiled"))


@pytest.mark.parametrize("family, settings", [
    ("opt", {"dropout": 0.3}), ("phimoe", {"router_jitter_noise": 0.3}), ("starcoder2", {"residual_dropout": 0.3}),
    ("biogpt", {"layerdrop": 0.5})])
def test_nothing_is_random_in_train_mode(saved, family, settings):
    model, _ = models.load_model(str(saved(family, **settings)))
    model.train()
    rows = scoring.Rows(*sampling.left_pad([[5, 6, 7]], 0, "cpu"), torch.arange(8, 20)[None], torch.ones(1, 12, dtype=torch.bool))
    assert torch.equal(*(scoring.policy_logps(model, rows, grpo.Args())[0] for _ in range(2)))


def test_what_stays_random_in_train_mode_is_refused(saved):
    model, tokenizer = models.load_model(str(saved("falcon", hidden_dropout=0.3)))
    problems, args = families.problems(tokenizer), grpo.Args(max_completion_length=8)
    self_check(model.eval(), tokenizer, problems, args)
    with pytest.raises(engine.RunError, match="FalconForCausalLM .* random in the mode that trains: leave out --gradient_checkpointing"):
        self_check(model.train(), tokenizer, problems, args)


def test_experts_are_charged_as_many_as_run(saved):
    """Of 4 experts of 3 x 32 x 64 weights in 2 layers 2 run: half of 98304 weights are charged less."""
    model, _ = models.load_model(str(saved("mixtral")))
    untied = model.num_parameters() - 288 * 32
    assert Flops.of(model).weights == untied - 2 * 4 * 3 * 32 * 64 // 2


def test_router_logits_are_not_asked_for(saved, run_script):
    """Their loss is not trained, and its function fails on the rows of a cache."""
    code, out, err = run_script(grpo, "--model", saved("mixtral", output_router_logits=True), *ALIKE)
    assert code == 0, err
    assert "output_router_logits is turned off" in out


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"), "it lacks model.layers.1.self_attn.q_proj.weight"),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name], "and 6 others"),
    (lambda tensors: tensors.pop("lm_head.weight"), "it lacks lm_head.weight"),
    (lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 32)}), "it has more: v_head.weight"),
    (lambda tensors: tensors.update({"lm_head.weight": torch.ones(290, 32)}), "it has in another shape lm_head.weight")],
    ids=("weight", "layer", "head", "value head", "vocabulary"))
def test_a_checkpoint_that_is_not_that_of_the_model_is_refused(weights, refused, change, words):
    line = refused(grpo, "--model", weights(change))
    assert "not that of a LlamaForCausalLM" in line and words in line


def test_extra_weights_pass_by_a_flag_and_missing_ones_never(weights, refused, run_script):
    extra = {"v_head.weight": torch.ones(1, 32)}
    folder = weights(lambda tensors: tensors.update(extra))
    assert "--ignore_extra_weights leaves them out" in refused(grpo, "--model", folder)
    code, out, err = run_script(grpo, "--model", folder, "--ignore_extra_weights", "--dry_run")
    assert code == 0 and "nothing was trained or written" in out, err
    for change in (lambda tensors: tensors.pop("lm_head.weight"), lambda tensors: (tensors.pop("lm_head.weight"), tensors.update(extra)),
                   lambda tensors: tensors.update({"lm_head.weight": torch.ones(290, 32)})):
        line = refused(grpo, "--model", weights(change), "--ignore_extra_weights")
        assert "lm_head.weight" in line and "leaves them out" not in line


def test_a_reward_model_is_refused(saved, refused):
    folder = saved("llama")
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    line = refused(grpo, "--model", folder)
    assert "it lacks lm_head.weight; it has more: score.weight" in line


def test_weights_that_may_be_left_out_or_over_are_not_missed(weights):
    """A tied head, and the causal masks that old checkpoints of GPT-Neo carry."""
    folder = weights(lambda tensors: tensors.update({"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8)}), "gpt_neo")
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    models.load_model(str(folder))


def test_the_eos_of_a_language_model_in_a_larger_one_ends_a_completion(saved):
    model, tokenizer = models.load_model(str(saved("gemma3")))
    model.config.text_config.eos_token_id = 40
    assert 40 in models.eos_ids(model, tokenizer)


@pytest.mark.parametrize("family, layers", [
    ("deepseek_v3", [(4, 12, 4)] * 2), ("gemma4_unified_text", [(4, 8, 2), (4, 512, 2)]), ("qwen3_next", [(4, 8, 2)]), ("mamba", [])])
def test_attention_is_charged_layer_by_layer(family, layers):
    """Queries of 16 and values of 8 cost 12; recurrent layers have none."""
    with torch.device("meta"):
        assert attention_layers(AutoModelForCausalLM.from_config(families.small_config(family))) == layers


@pytest.mark.parametrize("change, words", [
    (lambda tokenizer: tokenizer.add_tokens([f"<{number}>" for number in range(200)]), "ids up to"),
    (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<new>"}), "(<new>)"),
    (lambda tokenizer: (tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]}),
                        setattr(tokenizer, "chat_template", "<turn>{{ messages[0].content }}")), "(<turn>)"),
    (lambda tokenizer: (setattr(tokenizer, "pad_token", None), setattr(tokenizer, "eos_token", None)), "neither a pad nor an EOS")],
    ids=("words", "pad", "turn", "nothing"))
def test_a_tokenizer_that_does_not_fit_is_refused(tiny, folder, refused, change, words):
    change(tiny[1])
    for each in tiny:
        each.save_pretrained(folder)
    assert words in refused(grpo, "--model", folder)


def test_a_special_token_that_nothing_names_is_no_reason(tiny, folder):
    """Gemma 3's tokenizer has one for images, and its text models have no row for it."""
    tiny[1].add_special_tokens({"additional_special_tokens": ["<image>"]})
    for each in tiny:
        each.save_pretrained(folder)
    args = grpo.Args(model_name_or_path=str(folder))
    assert len(engine.load_policy(args)[1]) == tiny[0].config.vocab_size + 1


def test_no_eos_in_the_vocabulary_is_refused(tiny, folder, refused):
    tiny[1].eos_token = None
    for each in tiny:
        each.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, eos_token_id=9999)
    assert "no EOS id of 9999" in refused(grpo, "--model", folder)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_more_tokens_than_a_table_of_positions_are_refused(saved, refused, family):
    folder = saved(family)
    for flags in ((), ("--dry_run",)):
        line = refused(grpo, "--model", folder, "--max_completion_length", 120, *flags)
        assert "positions of" in line and "128" in line


def test_more_tokens_than_rope_was_made_for_are_said(saved, run_script):
    models.print_once.cache_clear()
    folder, flags = saved("llama"), (*ALIKE, "--dry_run")
    code, out, _ = run_script(grpo, "--model", folder, "--max_completion_length", 120, *flags)
    assert code == 0 and out.count("are more than the 128 positions of LlamaForCausalLM") == 1
    code, out, _ = run_script(grpo, "--model", folder, "--max_completion_length", 64, *flags)
    assert code == 0 and "positions of" not in out


def test_configs_without_the_usual_fields_are_planned(saved, run_script):
    for family in ("mamba", "gemma4_unified_text"):
        code, out, err = run_script(grpo, "--model", saved(family), *ALIKE, "--dry_run")
        assert code == 0 and "nothing was trained" in out, err


@pytest.mark.parametrize("flags, training", [((), False), (("--gradient_checkpointing",), True)])
def test_a_run_trains_in_eval_mode_unless_layers_recompute(run_script, monkeypatch, flags, training):
    """Eval mode is what turns off noise of a name that no list holds."""
    import grpo

    update, modes = grpo.update, []
    monkeypatch.setattr(grpo, "update", lambda model, *rest: modes.append(model.training) or update(model, *rest))
    code, _, err = run_script(grpo, "--max_steps", 1, "--prompts_per_step", 2, "--eval_steps", 0, *flags)
    assert code == 0 and modes == [training], err
