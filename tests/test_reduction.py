"""Is each variant with its knob off grpo.py, bit for bit?"""

import json

import pytest
import torch
from safetensors.torch import load_file

import grpo
import luffy
import prefixrl
import repo
from engine import run_log

# What switches each method off, and GRPO's defaults where the method's own differ.
OFF = {
    luffy: {"num_off_policy": 0, "loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2, "entropy_coef": 0.0, "num_minibatches": 1},
    repo: {"failure_threshold": 2.0},
    prefixrl: {"prefixes_per_trace": 0, "scale_rewards": "group", "trace_style": "own"},
}
# Metrics that a variant adds, off as it is: of its own tokens, and of rows and tokens of which there are none.
ADDED = {
    luffy: {"onpolicy/reward", "onpolicy/prob", "onpolicy/ratio", "onpolicy/loss"},
    repo: {"rephrase/failure_rate"},
    prefixrl: set(),
}
NOTHING = {
    luffy: {"offpolicy/solved_by_teacher_only": 0.0} | dict.fromkeys(("offpolicy/prob", "offpolicy/ratio", "offpolicy/loss")),
    repo: dict.fromkeys(("rephrase/asked", "rephrase/too_long", "rephrase/replaced"), 0.0)
          | dict.fromkeys(("rephrase/prob", "rephrase/ratio", "rephrase/context_gap")),
    prefixrl: {},
}
RUN = {"task": "diary", "num_hard": 6, "num_easy": 12, "prompts_per_step": 6, "num_generations": 4, "max_completion_length": 32,
       "max_steps": 3, "eval_steps": 3, "eval_problems": 4, "learning_rate": 1e-3, "temperature": 1.3, "seed": 7, "output_dir": "run"}
SETTINGS = {"on-policy": {}, "old and reference policy": {"num_minibatches": 2, "beta": 0.04}}
VARIANTS = pytest.mark.parametrize("variant", OFF, ids=lambda module: module.__name__)
BOTH_SETTINGS = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(module, **flags) -> (records of metrics.jsonl without times, final weights, random states after each rollout) of 3 steps."""
    def call(module, **flags):
        folder = tmp_path_factory.mktemp(module.__name__)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(run_log.RunLog, "finish", lambda log: None)  # no report.html, which takes longer than a step
            words = [word for name, value in (RUN | flags).items() for word in (f"--{name}", str(value))]
            states, update = [], module.update
            patch.setattr(module, "update", lambda *inputs: states.append(torch.get_rng_state()) or update(*inputs))
            patch.setattr("sys.argv", [f"{module.__name__}.py", *words])
            module.main()
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        records = [{key: value for key, value in json.loads(line).items() if "time" not in key} for line in lines]
        return records, load_file(folder / "run" / "model.safetensors"), torch.stack(states)

    return call


@pytest.fixture(scope="module")
def runs_of_grpo(run):
    return {setting: run(grpo, **flags) for setting, flags in SETTINGS.items()}


@BOTH_SETTINGS
def test_the_run_to_compare_with_has_a_signal(runs_of_grpo, setting):
    """Otherwise equal weights would say nothing: every step has a group with both rewards, a group without, and a gradient."""
    records, _, states = runs_of_grpo[setting]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    for record in records[1:]:
        assert 0 < record["frac_reward_zero_std"] < 1 and record["grad_norm"] > 1e-2
    assert len(states) == len(states.unique(dim=0)) == 3
    assert (records[3].get("kl", 0) > 0) == (setting != "on-policy")


@VARIANTS
@BOTH_SETTINGS
def test_three_steps_have_the_metrics_and_weights_of_grpo(run, runs_of_grpo, variant, setting):
    expected, expected_weights, expected_states = runs_of_grpo[setting]
    records, weights, states = run(variant, **OFF[variant] | SETTINGS[setting])
    for record, wanted in zip(records, expected, strict=True):
        assert record.keys() - wanted.keys() == (ADDED[variant] | NOTHING[variant].keys() if record["step"] else set())
        assert record == record | wanted | (NOTHING[variant] if record["step"] else {})
    assert torch.equal(states, expected_states)  # not one random number more or less
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weight, expected_weights[name]) for name, weight in weights.items())


NOBODY = torch.zeros(8, dtype=torch.bool)


@VARIANTS
@pytest.mark.parametrize("flags", [
    {}, {"loss_type": "grpo", "beta": 0.04, "epsilon_high": 0.28}, {"loss_type": "dr_grpo", "entropy_coef": 0.01, "scale_rewards": "none"}])
def test_loss_and_gradient_of_random_tensors_are_those_of_grpo(variant, flags):
    torch.manual_seed(0)
    logps, old_logps, ref_logps, entropy = -3 * torch.rand(4, 8, 6)
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 3, 6, 2, 5, 0]).unsqueeze(1)
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0.5, 0])
    results = []
    for module, off in ((grpo, {}), (variant, OFF[variant])):
        args = module.Args(**off | flags)
        inputs = [logps.clone().requires_grad_(), entropy.clone().requires_grad_()]
        advantages = module.group_advantages(rewards, 4, args.scale_rewards)
        nobody = {luffy: {"off_policy": NOBODY}, repo: {"rephrased": NOBODY, "behavior_logps": torch.zeros(8, 6)}}.get(module, {})
        batch = module.Batch(None, None, None, None, mask, advantages, old_logps, ref_logps if args.beta else None, **nobody)
        loss, sums = module.policy_loss(*inputs, batch, args, 27, 8)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        results.append({"loss": loss, "by logps": gradients[0], "by entropy": gradients[1]}
                       | {name: torch.stack(pair) for name, pair in sums.items()})
    wanted, mine = results
    assert (wanted["by logps"] != 0).sum() > 10
    assert {name.split("/")[0] for name in mine.keys() - wanted.keys()} <= {"onpolicy", "offpolicy", "rephrase"}
    assert all(torch.equal(mine[name], value) for name, value in wanted.items())
