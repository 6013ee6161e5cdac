"""Do two ranks compute what one does, whatever falls to each, and do they live and die together?"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel

ROOT = Path(parallel.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def launch(*words, timeout=300, expected=0):
    """Run a command to its end within a time limit; returns (stdout, stderr)."""
    done = subprocess.run([str(word) for word in words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout,
                          capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "one.pt"
    launch(sys.executable, "tests/ranks.py", "ddp", out)
    return torch.load(out)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_are_one_rank_with_the_same_rows(one_rank, tmp_path, mode):
    """Every script, three steps: uneven groups and micro-batches, two updates a batch, a reference model, and a rank without any row."""
    launch(*TORCHRUN, "tests/ranks.py", mode, tmp_path / "two.pt")
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
                same = record[metric] == pytest.approx(expected[metric], rel=5e-4, abs=1e-6, nan_ok=True)
                assert same, (name, metric, record[metric], expected[metric])
        assert any(record["grad_norm"] > 0.01 for record in records), name
        for weight in weights:
            assert (weights[weight] - expected_weights[weight]).abs().max() < 1e-6, (name, weight)
        if mode == "ddp":
            assert len(checksums) == 2 and checksums[0] == checksums[1], name


def test_alone_nothing_is_shared_or_copied(tiny):
    gradient = torch.ones(3)
    items = [gradient]
    assert parallel.rank() == 0 and parallel.world_size() == 1
    assert parallel.gather(items) is items and parallel.sum_over_ranks(gradient) is gradient
    assert parallel.share(7) == slice(0, 7)


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_shares_are_all_rows_once_and_whole_groups_where_ranks_divide_the_prompts(monkeypatch, count, ranks):
    monkeypatch.setattr(parallel, "world_size", lambda: ranks)
    rows = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        share = parallel.share(count)
        assert share.stop - share.start <= math.ceil(count / ranks)
        rows += range(count)[share]
    assert rows == list(range(count))
