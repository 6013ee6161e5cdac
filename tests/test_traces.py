"""Are collected traces what the sampler drew, verified, counted and paid for, whenever the run is killed?"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import engine
import eval as eval_script
import processes
from engine import tasks
from engine.grading import grade
from engine.trace_ledger import traces_flops

ROOT = Path(eval_script.__file__).parent
# At temperature 2 easy problems have a second right trace now and then (in the teacher's words, or a lucky slip), hard ones hardly one.
# 20 tries are 4 waves, the last one of 2 samples, and a problem's samples straddle batches.
FLAGS = {"--task": "diary", "--num_hard": 2, "--num_easy": 4, "--num_generations_eval": 6, "--max_tries": 20, "--traces_per_problem": 2,
         "--temperature": 2.0, "--generation_batch_size": 16, "--max_completion_length": 32, "--save_traces": "t.jsonl"}


def flags(**changes):
    if "dataset_name" in changes:  # the flags of the built-in task do not go with it
        changes |= dict.fromkeys(("task", "num_hard", "num_easy"))
    changed = FLAGS | {f"--{name}": value for name, value in changes.items()}
    return [word for name, value in changed.items() if value is not None for word in (name, value)]


def read(folder):
    """(traces, ledger) that lie in `folder`."""
    lines = (folder / "t.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "t.ledger.json").read_text())


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """(folder, drawn): an uninterrupted run, and all that it sampled, in order: (prompt ids, sampled ids with EOS)."""
    folder, drawn, generate = tmp_path_factory.mktemp("whole"), [], common.generate

    def recorded(model, prompt_ids, prompt_mask, *rest):
        output = generate(model, prompt_ids, prompt_mask, *rest)
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask)]
        drawn.extend(zip(prompts, [ids[mask].tolist() for ids, mask in zip(*output)]))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["eval.py", *map(str, flags())])
        patch.setattr(common, "generate", recorded)
        eval_script.main()
    return folder, drawn


def test_the_file_holds_the_first_distinct_right_samples_and_the_ledger_counts_all(collected, tiny):
    """Worked out again from every sample that was drawn: traces, their order in each problem, tries, right ones."""
    (traces, ledger), drawn = read(collected[0]), collected[1]
    assert ledger["samples"] == len(drawn) == sum(problem["tries"] for problem in ledger["problems"])
    for problem in ledger["problems"]:
        samples = [ids for prompt, ids in drawn if prompt == tiny[1](problem["prompt"])["input_ids"]]
        texts = [tiny[1].decode(ids[:-1]) for ids in samples]
        right = [ids[-1] == tiny[1].eos_token_id and grade(text, problem["answer"]) == 1.0 for ids, text in zip(samples, texts)]
        first = {tuple(ids): place for place, ids in reversed(list(enumerate(samples, 1))) if right[place - 1]}  # ids -> first tries
        expected = sorted(first.items(), key=lambda item: item[1])[:2]
        mine = [traces[line] for line in problem["lines"]]
        assert [(tuple(trace["trace_ids"]), trace["tries"]) for trace in mine] == expected
        assert all(trace["prompt"] == problem["prompt"] for trace in mine)
        assert (problem["tries"], problem["right"]) == (len(samples), sum(right))
        waves = [6, 12, 18, 20]  # tries after each; a problem leaves after the wave that finishes it
        assert problem["tries"] == (20 if len(mine) < 2 else min(tries for tries in waves if tries >= mine[1]["tries"]))
    assert sorted(line for problem in ledger["problems"] for line in problem["lines"]) == list(range(len(traces)))
    numbers = [len(problem["lines"]) for problem in ledger["problems"]]
    assert max(numbers) == 2 and min(numbers) < 2  # problems of both kinds, or nothing was tested
    assert ledger["waves"] == 4 and ledger["done"] and ledger["bytes"] == (collected[0] / "t.jsonl").stat().st_size


def test_a_trace_decodes_ends_and_grades_right(collected, tiny):
    traces, _ = read(collected[0])
    for trace in traces:
        assert list(trace) == ["prompt", "answer", "difficulty", "trace", "trace_ids", "logps", "tries", "temperature", "source_model",
                               "steps_right"]
        assert trace["trace_ids"].index(tiny[1].eos_token_id) == len(trace["trace_ids"]) - 1
        assert tiny[1].decode(trace["trace_ids"][:-1]) == trace["trace"]
        assert grade(trace["trace"], trace["answer"]) == 1.0
        assert trace["steps_right"] == (trace["trace"] in (tasks.solve(trace["prompt"])[0], tasks.solve(trace["prompt"], "teacher")[0]))
        assert (trace["temperature"], trace["source_model"]) == (2.0, "tiny_model")


def test_logps_are_those_of_the_model_at_the_sampling_temperature(collected, tiny):
    """Each trace on its own, without padding, from the model's logits."""
    model, tokenizer = tiny
    for trace in read(collected[0])[0]:
        prompt, ids = tokenizer(trace["prompt"])["input_ids"], trace["trace_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 2.0, -1)[range(len(ids)), ids]
        assert len(trace["logps"]) == len(ids)
        assert torch.tensor(trace["logps"]) == pytest.approx(expected, abs=1e-4)


def test_flops_are_those_of_all_samples_and_of_scoring_the_traces(collected, tiny):
    """By hand: 2 W D + 2 L A D^2 a sequence of D tokens; the paper's rule 2 N D, of samples only. Other files cost nothing."""
    (traces, ledger), drawn = read(collected[0]), collected[1]
    lengths = [len(prompt) + len(ids) for prompt, ids in drawn]
    weights = tiny[0].num_parameters()
    scored = [len(tiny[1](trace["prompt"])["input_ids"]) + len(trace["trace_ids"]) for trace in traces]
    assert ledger["flops"] == sum(2 * weights * d + 2 * 3 * 96 * d * d for d in lengths + scored)
    assert ledger["flops_paper"] == 2 * weights * sum(lengths)
    assert traces_flops(collected[0] / "t.jsonl") == (ledger["flops"], ledger["flops_paper"])
    assert traces_flops(collected[0] / "teacher.jsonl") == (0.0, 0.0)


def test_problems_are_the_training_problems_of_grpo(collected):
    ledger = read(collected[0])[1]
    expected = tasks.problems("diary", "train", "hard", 2) + tasks.problems("diary", "train", "easy", 4)
    assert [problem["prompt"] for problem in ledger["problems"]] == [row["prompt"] for row in expected]
    assert not any(tasks.in_eval_split(problem["prompt"]) for problem in ledger["problems"])


def test_a_problem_out_of_reach_spends_max_tries_and_yields_no_line(run_script, tmp_path):
    code, out, err = run_script(eval_script, "--num_hard", 2, "--num_generations_eval", 8, "--max_tries", 20, "--save_traces", "t.jsonl")
    assert code == 0, err
    traces, ledger = read(tmp_path)
    assert traces == [] and [problem["tries"] for problem in ledger["problems"]] == [20, 20] and ledger["done"]
    assert "solved 0 of 2 problems with 40 samples, 40 tries on unsolved ones" in out


def test_the_summary_adds_up(run_script, tmp_path):
    code, out, err = run_script(eval_script, *flags(traces_per_problem=1, num_hard=1))
    assert code == 0, err
    traces, ledger = read(tmp_path)
    solved = [problem for problem in ledger["problems"] if problem["lines"]]
    lost = sum(problem["tries"] for problem in ledger["problems"] if not problem["lines"])
    mean = sum(trace["tries"] for trace in traces) / len(traces)
    assert f"solved {len(solved)} of 5 problems with {ledger['samples']} samples: {mean:.1f} tries each on average, {lost} tries" in out
    assert f"{sum(trace['steps_right'] for trace in traces)} of {len(traces)} traces have every step right" in out
    assert f"{ledger['flops']:.3g} FLOPs spent" in out


def test_traces_of_a_data_set(run_script, tmp_path):
    """--eval_problems caps it; no steps_right, which only the built-in tasks can tell; equal prompts are problems of their own."""
    row = tasks.problems("diary", "train", "easy", 1)[0]
    line = json.dumps({"question": row["prompt"], "solution": row["answer"]}) + "\n"
    (tmp_path / "mine.jsonl").write_text(3 * line)
    changes = {"dataset_name": "mine.jsonl", "eval_problems": 2, "traces_per_problem": 1, "max_completion_length": 64}
    code, out, err = run_script(eval_script, *flags(**changes))
    assert code == 0, err
    traces, ledger = read(tmp_path)
    assert [problem["lines"] for problem in ledger["problems"]] == [[0], [1]] and len(traces) == 2
    assert all("steps_right" not in trace and trace["difficulty"] == "all" for trace in traces) and "every step right" not in out


# ---------------------------------------------------------------- killed, interrupted, refused


def die_in(moment):
    """Have this process killed with SIGKILL at a moment of collecting."""
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def on_call(number, function):
        left = iter(range(number, 0, -1))

        def counted(*inputs, **more):
            if next(left) == 1:
                kill()
            return function(*inputs, **more)
        return counted

    def torn_append(path, records, append=eval_script.append_jsonl):
        append(path, records)
        if records:
            os.truncate(path, path.stat().st_size - 30)
            kill()

    if moment == "torn":  # while the lines of a wave are written
        eval_script.append_jsonl = torn_append
    elif moment == "appended":  # the lines are there; the ledger, written once at the start, is about to follow
        eval_script.write_atomically = on_call(2, eval_script.write_atomically)
    elif moment == "renaming":  # one wave done; the next one's ledger is written beside, not yet in its place
        os.replace = on_call(3, os.replace)
    elif moment == "sampling":  # one wave done, the next one begun: a wave samples 2 or 3 times
        common.generate = on_call(4, common.generate)


def die_again_and_again():
    """Run eval.py with this process's flags in children that die one after the other, the last one of old age; prints their fates."""
    for moment in ("torn", "appended", "renaming", "sampling", None):
        child = os.fork()
        if child == 0:
            die_in(moment)
            engine.launch(eval_script.main)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        ledger, size = json.loads(Path("t.ledger.json").read_text()), Path("t.jsonl").stat().st_size
        fate = {"moment": moment, "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "waves": ledger["waves"],
                "unknown_bytes": size - ledger["bytes"], "torn": not Path("t.jsonl").read_bytes().endswith(b"\n")}
        print(json.dumps(fate))


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(collected, tmp_path):
    """Four kills with SIGKILL in one collection, each in another state of the two files."""
    process = processes.run(__file__, *flags(), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    fates = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"moment"')]
    assert [(fate["killed"], fate["waves"]) for fate in fates] == [(True, 0), (True, 0), (True, 1), (True, 2), (False, 4)], process.stderr
    assert fates[0]["torn"] and fates[1]["unknown_bytes"] > 0 and not fates[1]["torn"]
    for name in ("t.jsonl", "t.ledger.json"):
        assert (tmp_path / name).read_bytes() == (collected[0] / name).read_bytes()


@pytest.fixture
def begin(run_script, monkeypatch):
    """Collect with Ctrl-C in the second wave: begin() -> stderr."""
    def call(**changes):
        whole = eval_script.sample_wave

        def interrupted(model, tokenizer, problems, num, args, wave, flops):
            for sample in whole(model, tokenizer, problems, num, args, wave, flops):
                yield sample
                if wave == 1:
                    raise KeyboardInterrupt

        monkeypatch.setattr(eval_script, "sample_wave", interrupted)
        code, _, err = run_script(eval_script, *flags(**changes))
        monkeypatch.setattr(eval_script, "sample_wave", whole)
        assert code == 130
        return err

    return call


def test_interrupted_it_says_how_to_go_on_and_cuts_a_torn_line(begin, run_script, collected, tmp_path):
    assert "the same command goes on" in begin().splitlines()[-1]
    assert read(tmp_path)[1]["waves"] == 1
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write('{"prompt": "Q: Ann has 3')
    code, out, err = run_script(eval_script, *flags())
    assert code == 0, err
    assert "going on with t.jsonl after 1 waves: 36 samples so far" in out
    for name in ("t.jsonl", "t.ledger.json"):
        assert (tmp_path / name).read_bytes() == (collected[0] / name).read_bytes()


def test_other_flags_do_not_go_on(begin, run_script, tmp_path):
    begin()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changes = ("traces_per_problem", 1, 2), ("seed", 3, 0), ("num_generations_eval", 4, 6), ("generation_batch_size", 8, 16)
    for flag, value, was in changes:
        code, _, err = run_script(eval_script, *flags(**{flag: value}))
        assert code == 2 and err.count("\n") == 1 and f"--{flag} {value}: t.jsonl was begun with {was}" in err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_begun_under_a_flags_old_name_is_known(begin, run_script, tmp_path):
    begin()
    ledger = json.loads((tmp_path / "t.ledger.json").read_text())
    ledger["args"]["stop_at"] = ledger["args"].pop("traces_per_problem")
    (tmp_path / "t.ledger.json").write_text(json.dumps(ledger))
    assert "--traces_per_problem 1: t.jsonl was begun with 2" in run_script(eval_script, *flags(traces_per_problem=1))[2]
    code, out, err = run_script(eval_script, *flags())
    assert code == 0 and "going on with t.jsonl after 1 waves" in out and read(tmp_path)[1]["done"], err


def test_a_file_that_another_program_wrote_again_is_refused_as_it_is(begin, run_script, tmp_path):
    begin()
    foreign = (tmp_path / "t.jsonl").read_text().replace('": ', '":  ')  # the same lines, longer
    (tmp_path / "t.jsonl").write_text(foreign)
    code, _, err = run_script(eval_script, *flags())
    assert code == 2 and "--save_traces t.jsonl: its lines are not those that t.ledger.json counts" in err
    assert (tmp_path / "t.jsonl").read_text() == foreign


def test_other_problems_or_a_shortened_file_do_not_go_on(begin, run_script, tmp_path):
    rows = tasks.problems("diary", "train", "easy", 3)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows))
    changes = {"dataset_name": "mine.jsonl", "max_completion_length": 64}
    begin(**changes)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "answer": "7"}) + "\n" for row in rows))
    code, _, err = run_script(eval_script, *flags(**changes))
    assert code == 2 and "--save_traces t.jsonl was begun with other problems" in err.splitlines()[-1]
    (tmp_path / "t.jsonl").write_text("")
    code, _, err = run_script(eval_script, *flags(**changes))
    assert code == 2 and "--save_traces t.jsonl has 0 bytes, but t.ledger.json counts " in err


@pytest.mark.parametrize("what", ["weights", "prompts"])
def test_other_weights_or_another_system_message_do_not_go_on(what, begin, run_script, tmp_path):
    """In the same folder and file, with the same questions and answers."""
    shutil.copytree(tasks.TINY_MODEL, tmp_path / "base", ignore=shutil.ignore_patterns("traces", "*.py"))
    rows = [{"prompt": [{"role": "system", "content": "Q:"}, {"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
            for row in tasks.problems("diary", "train", "easy", 3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"model_name_or_path": "base", "dataset_name": "mine.jsonl", "max_completion_length": 64}
    begin(**changes)
    if what == "prompts":
        (tmp_path / "mine.jsonl").write_text((tmp_path / "mine.jsonl").read_text().replace('"Q:"', '"A:"'))
    else:
        weights = load_file(tmp_path / "base" / "model.safetensors")
        save_file({name: weight + 1e-3 for name, weight in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    code, _, err = run_script(eval_script, *flags(**changes))
    assert code == 2 and f"--save_traces t.jsonl was begun with other {what}: choose another file" in err.splitlines()[-1]


def test_a_template_that_writes_the_date_goes_on_tomorrow(begin, run_script, tmp_path):
    """Its prompts are others then; the test changes their system message instead of the clock."""
    shutil.copytree(tasks.TINY_MODEL, tmp_path / "base", ignore=shutil.ignore_patterns("traces", "*.py"))
    (tmp_path / "base" / "chat_template.jinja").write_text("{# strftime_now #}{% for m in messages %}{{ m.content }} {% endfor %}")
    rows = [{"prompt": [{"role": "system", "content": "Q:"}, {"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
            for row in tasks.problems("diary", "train", "easy", 3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"model_name_or_path": "base", "dataset_name": "mine.jsonl", "max_completion_length": 64}
    begin(**changes)
    (tmp_path / "mine.jsonl").write_text((tmp_path / "mine.jsonl").read_text().replace('"Q:"', '"A:"'))
    code, _, err = run_script(eval_script, *flags(**changes))
    assert code == 0 and read(tmp_path)[1]["done"], err


def test_nothing_that_exists_is_written_over(run_script, collected, monkeypatch, tmp_path):
    (tmp_path / "t.jsonl").write_text("precious\n")
    code, _, err = run_script(eval_script, *flags())
    assert code == 2 and "--save_traces t.jsonl exists already, without a t.ledger.json" in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("t.jsonl", "precious\n")]
    monkeypatch.chdir(collected[0])
    code, _, err = run_script(eval_script, *flags())
    assert code == 2 and "--save_traces t.jsonl is complete" in err


@pytest.mark.parametrize("changes, expected", [
    ({"temperature": 0}, "--temperature 0 does not go with --save_traces"),
    ({"output_file": "e.json"}, "--output_file does not go with --save_traces"),
    ({"max_tries": 0}, "--max_tries must be at least 1, got 0"),
    ({"traces_per_problem": 0}, "--traces_per_problem must be at least 1, got 0"),
    ({"stop_at": 1}, "--stop_at is now --traces_per_problem"),
    ({"num_hard": -1}, "--num_hard must be at least 0, got -1"),
    ({"top_p": 0.9}, "--top_p must be 1 with --save_traces"), ({"save_traces": None}, "says nothing without --save_traces"),
    ({"eval_problems": 4}, "--eval_problems does not go with the built-in task and --save_traces"),
    ({"save_traces": "t.json"}, "--save_traces t.json must end in .jsonl"),
    ({"save_traces": "nowhere/t.jsonl"}, "--save_traces nowhere/t.jsonl: No such file or directory"),
    ({"num_hard": 0, "num_easy": 0}, "--num_hard 0 --num_easy 0: no problem is left"),
    *([] if torch.cuda.is_available() else [({"logprob_impl": "triton"}, "--logprob_impl: impl triton needs the package triton")]),
])
def test_flags_that_would_break_the_files_promise_are_refused_and_touch_nothing(run_script, tmp_path, changes, expected):
    code, _, err = run_script(eval_script, *flags(**changes))
    assert code == 2 and err.strip().count("\n") == 0 and expected in err
    assert list(tmp_path.iterdir()) == []


def test_traces_that_do_not_end_are_refused(run_script, tmp_path):
    code, _, err = run_script(eval_script, *flags(), "--grade_truncated")
    assert code == 2 and "--grade_truncated does not go with --save_traces" in err and list(tmp_path.iterdir()) == []


def test_each_wave_draws_anew(collected, tiny):
    """Its samples are a function of (seed, wave): no problem gets the samples of the wave before again."""
    folder, drawn = collected
    for problem in json.loads((folder / "t.ledger.json").read_text())["problems"]:
        samples = [ids for prompt, ids in drawn if prompt == tiny[1](problem["prompt"])["input_ids"]]
        waves = [samples[start : start + 6] for start in range(0, len(samples), 6)]
        assert all(later[: len(wave)] != wave[: len(later)] for wave, later in zip(waves, waves[1:]))


if __name__ == "__main__":
    die_again_and_again()
