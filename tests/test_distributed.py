"""Do two ranks compute what one does, whatever falls to each, and do they live and die together?"""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import processes
from engine import ranks

ROOT = Path(__file__).parent.parent
TORCHRUN = ["torchrun", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def launch(*words, ranks=2, expected=0, **variables):
    """Run a script on that many ranks, 0: alone, to its end; returns (stdout, stderr)."""
    done = processes.run(*words, ranks=ranks, **variables)
    assert done.returncode == expected, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "one.pt"
    launch("tests/ranks.py", "ddp", out, ranks=0)
    return torch.load(out)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_are_one_rank_with_the_same_rows(one_rank, tmp_path, mode):
    """Every script, two steps: uneven groups and micro-batches, two updates a batch, a reference model, and a rank without any row."""
    launch("tests/ranks.py", mode, tmp_path / "two.pt")
    two_ranks = torch.load(tmp_path / "two.pt")
    assert two_ranks.keys() == one_rank.keys()
    (ids, mask, calls), (expected_ids, expected_mask, _) = two_ranks.pop("greedy completions"), one_rank["greedy completions"]
    assert torch.equal(ids, expected_ids) and torch.equal(mask, expected_mask)
    assert len(calls) == 2 and all(len(set(of_rank)) > 1 for of_rank in calls)  # both are cut
    assert len(calls[0]) != len(calls[1])
    for name, (weights, records, ledger, checksums) in two_ranks.items():
        expected_weights, expected_records, expected_ledger, _ = one_rank[name]
        assert ledger == expected_ledger, name
        for record, expected in zip(records, expected_records, strict=True):
            assert record.keys() == expected.keys() and record["texts"] == expected["texts"], name
            for metric in record.keys() - {"texts"}:
                same = record[metric] == pytest.approx(expected[metric], rel=2e-3, abs=1e-6, nan_ok=True)
                assert same, (name, metric, record[metric], expected[metric])
        assert any(record["grad_norm"] > 1e-4 for record in records), name
        for weight in weights:
            assert (weights[weight] - expected_weights[weight]).abs().max() < 1e-6, (name, weight)
        if mode == "ddp":
            assert len(checksums) == 2 and checksums[0] == checksums[1], name


SMALL = ["--task", "diary", "--prompts_per_step", 3, "--num_generations", 4, "--num_hard", 2, "--num_easy", 10, "--temperature", 1.5,
         "--max_completion_length", 24, "--eval_problems", 2, "--eval_steps", 3, "--max_steps", 3, "--save_steps", 1,
         "--save_completions_steps", 1]


def records(folder):
    """What a run has left, without its clocks."""
    clocks = ("step_time", "time/rollout", "time/update")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    completions = {path.name: path.read_text() for path in (folder / "completions").iterdir()}
    return [{name: value for name, value in record.items() if name not in clocks} for record in metrics], completions


def start_and_stop(folder, *words, stop):
    """Start a run, call stop(torchrun's process) after its first step, and wait; returns (exit code, stderr)."""
    started = processes.start(*words)
    limit = time.monotonic() + 200
    while not (folder / "checkpoint-1").exists():
        assert started.poll() is None and time.monotonic() < limit, started.stderr
        time.sleep(0.02)
    stop(started)
    return started.wait(60), started.stderr


def kill_a_rank(torchrun):
    """SIGKILL for rank 1, the younger child."""
    pid = torchrun.pids[0]
    _, rank = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)


@pytest.mark.parametrize("mode, stop", [("ddp", kill_a_rank), ("fsdp", lambda torchrun: torchrun.send_signal(signal.SIGTERM))],
                         ids=["ddp, a rank is killed", "fsdp, SIGTERM"])
def test_a_run_that_one_rank_or_a_signal_ended_goes_on_bit_equal(tmp_path, mode, stop):
    flags = [*SMALL, "--parallel", mode, "--dtype", "bfloat16" if mode == "fsdp" else "float32"]
    launch("grpo.py", *flags, "--output_dir", tmp_path / "whole")
    code, err = start_and_stop(tmp_path / "cut", *TORCHRUN, "grpo.py", *flags, "--output_dir", tmp_path / "cut", stop=stop)
    assert code != 0 and not (tmp_path / "cut" / "model.safetensors").exists()
    if stop is kill_a_rank:
        assert "Traceback" in err and "Signal 9 (SIGKILL) received by PID" in err
    else:
        assert err.count("interrupted after step") == 1 and "torchrun --nproc_per_node=2" in err
    launch("grpo.py", "--resume_from_checkpoint", tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    steps = records(tmp_path / "whole")[0]
    assert [record["step"] for record in steps] == list(range(4))  # each line once: rank 0 writes
    assert steps[1]["grad_norm"] > 0 and steps[3]["grad_norm"] > 0  # before and after the end
    assert json.loads((tmp_path / "whole" / "args.json").read_text())["ranks"] == 2
    if mode == "fsdp":
        *_, last = launch("grpo.py", "--resume_from_checkpoint", tmp_path / "cut", ranks=0, expected=2)[1].splitlines()
        assert last.endswith("--parallel fsdp needs many processes: torchrun --nproc_per_node=K grpo.py ...")
        *_, last = launch("grpo.py", "--resume_from_checkpoint", tmp_path / "cut", "--parallel", "ddp", ranks=0,
                          expected=2)[1].splitlines()
        assert last.endswith("was written with --parallel fsdp: give the same")


def test_a_sharded_checkpoint_is_read_by_another_number_of_ranks(tmp_path):
    launch("tests/ranks.py", "save", tmp_path, tmp_path / "two.pt")
    launch("tests/ranks.py", "load", tmp_path, tmp_path / "one.pt", ranks=1)
    written, read = torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "one.pt")
    assert written["param_groups"] == read["param_groups"] and written["state"].keys() == read["state"].keys()
    for name, moments in written["state"].items():
        assert moments["exp_avg"].any() and moments["step"] == 1
        assert all(torch.equal(moments[moment], read["state"][name][moment]) for moment in moments), name


def test_evaluation_and_traces_of_two_ranks_are_whole(tmp_path):
    base = ["eval.py", "--task", "diary", "--max_completion_length", 40, "--generation_batch_size", 5]
    launch(*base, "--eval_problems", 3, "--num_generations_eval", 3, "--output_file", tmp_path / "eval.json",
           "--output_problems", tmp_path / "problems.jsonl")
    problems = json.loads((tmp_path / "eval.json").read_text())["problems"]
    assert [len(problem["rewards"]) for problem in problems] == [3] * 9
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 9
    launch(*base, "--num_hard", 0, "--num_easy", 3, "--num_generations_eval", 3, "--max_tries", 6,
           "--save_traces", tmp_path / "traces.jsonl")
    ledger = json.loads((tmp_path / "traces.ledger.json").read_text())
    traces = (tmp_path / "traces.jsonl").read_text().splitlines()
    assert ledger["done"] and len(traces) == sum(len(problem["lines"]) for problem in ledger["problems"]) > 0
    assert ledger["samples"] == sum(problem["tries"] for problem in ledger["problems"]) >= 9


SLOW_TO_LET_GO = """
import sys
import time

import torch

sys.path.insert(0, sys.argv[1])
import engine
from engine.run import Interrupted

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.2)

def main():
    global mesh
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))  # keeps gloo's threads alive, as a sharded model does
    tensor = torch.ones(1)
    tensor.slow = Slow()  # deleted by a thread of gloo
    torch.distributed.all_reduce(tensor, async_op=True)
    del tensor
    if sys.argv[2] == "interrupted":
        raise Interrupted(15, "stopped")

engine.launch(main)
"""


@pytest.mark.parametrize("end, code", [("regular", 0), ("interrupted", 143)])
def test_a_rank_does_not_end_while_a_thread_of_gloo_lets_go_of_a_tensor(tmp_path, end, code):
    """Such a thread waits for the interpreter, and an ending one aborts the process: 7 of 8 times unguarded, 1 of 3 with a barrier."""
    (tmp_path / "slow.py").write_text(SLOW_TO_LET_GO)
    for _ in range(3):
        _, err = launch(tmp_path / "slow.py", ROOT, end, expected=code, TAKE_DOWN="1")
        assert "terminate called" not in err


def test_what_all_ranks_meet_is_said_once():
    _, err = launch("grpo.py", "--model", "no_such_model", expected=2)
    assert err.count("grpo.py: error: ") == 1 and "--model_name_or_path no_such_model: no such folder" in err


SUMMED = """
import torch
import engine
from engine import ranks

def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    alone, own, calls = torch.autograd.grad(model(torch.ones(1, 3)).square().sum(), trained(model)), torch.distributed.all_reduce, []
    torch.distributed.all_reduce = lambda tensor: (calls.append(tensor.numel()), own(tensor))
    for times in (1, 2):
        engine.zero_grad(model)
        for _ in range(times * ranks.rank()):  # rank 0 has no row
            model(torch.ones(1, 3)).square().sum().backward()
        norm = ranks.clip_grad_norm(model, 1e9)
        wrong = [name for name, weight in model.named_parameters() if weight.requires_grad
                 and not torch.equal(weight.grad, times * dict(zip(trained(model), alone))[weight])]
        print(ranks.all_gather_list([wrong, norm.item() > 1]))
    model[2].bias.grad = torch.ones(2)
    try:
        ranks.clip_grad_norm(model, 1e9)
    except ValueError as error:
        print(error)
    print(calls)

def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]

engine.launch(main)
"""


def test_one_collective_call_sums_the_gradients_of_all_weights_that_are_trained():
    """Those of a rank without a row are zeros; those that are not of one tensor would be lost, and are refused."""
    out, _ = launch("-c", SUMMED, PYTHONPATH=str(ROOT))
    same = "[[], True, [], True]"
    assert out.splitlines() == [same, same, "the gradients are not those of zero_grad: a rank would lose some", "[30, 30]"]


def test_alone_nothing_is_shared_or_copied(tiny):
    gradient = torch.ones(3)
    items = [gradient]
    assert ranks.rank() == 0 and ranks.world_size() == 1
    assert ranks.all_gather_list(items) is items and ranks.sum_over_ranks(gradient) is gradient
    assert ranks.own_slice(7) == slice(0, 7)


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shares_are_all_rows_once_and_whole_groups_where_ranks_divide_the_prompts(monkeypatch, count, world_size):
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    rows = []
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        share = ranks.own_slice(count)
        assert share.stop - share.start <= math.ceil(count / world_size)
        rows += range(count)[share]
    assert rows == list(range(count))


@pytest.mark.parametrize("variables, missing", [
    ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "RANK, WORLD_SIZE"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "RANK, WORLD_SIZE"), ({"RANK": "1"}, "WORLD_SIZE"),
])
def test_one_of_many_processes_that_knows_of_no_other_is_refused(tmp_path, variables, missing):
    """Each would train alone, and exit with 0."""
    done = processes.run("grpo.py", "--max_steps", "1", cwd=tmp_path, **variables)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f", but {missing}" in done.stderr and not list(tmp_path.iterdir())


def test_processes_of_any_launcher_join(tmp_path):
    """By torch's own variables, as srun or mpirun set them by hand; without torchrun's."""
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(processes.free_port())}
    code = ("import sys\nfrom engine import ranks\nranks.start()\n"
            "print(ranks.all_gather_list([ranks.rank()]), file=sys.stderr)\nranks.finish()")
    both = [processes.start("-c", code, RANK=str(rank), **launched) for rank in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [process.stderr.splitlines()[-1] for process in both] == ["[0, 1]"] * 2
