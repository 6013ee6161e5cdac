"""Are the built-in problems what they claim, and is the shipped base fit for them?"""

import itertools
import json
import random

import pytest

import common
from engine import models, tasks
from engine.grading import grade
from tiny_model import build

BILL = "Q: Tom buys 2 drimp , 3 jarn . Bill ? A:"
DIARY = "Q: Ben has 43 books , Mon wins 3 , Tue loses 2 . How many ? A:"


@pytest.mark.parametrize("prompt, own, teacher, answer", [
    (BILL, "2 drimp at 6 = 12 ; 3 jarn at 7 = 21 ; \\boxed{ 12 , 21 }",
     "drimp costs six so two cost twelve . jarn costs seven so three cost twenty-one . hence \\boxed{ 12 , 21 }", "12 , 21"),
    (DIARY, "43 Mon + 3 = 46 Tue - 2 = 44 ; \\boxed{ 44 }",
     "start from forty-three . first adding three yields forty-six . second removing two yields forty-four . hence \\boxed{ 44 }", "44"),
    ("Q: Largest of 5 , 31 , 7 ? A:", "\\boxed{ 31 }", "\\boxed{ 31 }", "31"),
    ("Q: Reverse 5 , 31 , 7 ? A:", "\\boxed{ 7 , 31 , 5 }", "\\boxed{ 7 , 31 , 5 }", "7 , 31 , 5"),
])
def test_solutions_against_hand_written_ones(prompt, own, teacher, answer):
    assert tasks.solve(prompt, "own") == (own, answer)
    assert tasks.solve(prompt, "teacher") == (teacher, answer)


def test_a_slip_books_every_loss_as_a_gain():
    assert tasks.solve(DIARY, slip=lambda: True) == ("43 Mon + 3 = 46 Tue + 2 = 48 ; \\boxed{ 48 }", "48")


def test_a_prompt_of_no_family_is_refused():
    with pytest.raises(ValueError, match="not a prompt of the built-in tasks"):
        tasks.solve("Q: Who is there ? A:")


def test_number_words():
    assert [tasks.number_word(n) for n in (0, 13, 20, 43, 57)] == ["zero", "thirteen", "twenty", "forty-three", "fifty-seven"]
    assert len(set(tasks.NUMBER_WORDS)) == tasks.MAX_NUMBER + 1


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_have_gold_traces_in_both_styles_and_differ(task):
    for difficulty in tasks.DIFFICULTIES:
        rows = tasks.problems(task, "train", difficulty, 100)
        assert len({row["prompt"] for row in rows}) == 100
        for row in rows:
            for trace in (row["own_trace"], row["teacher_trace"]):
                assert grade(trace, row["answer"], "exact") == 1.0
                assert tasks.steps_are_right(row["prompt"], trace)
            assert not tasks.uses_foreign_words(row["own_trace"])
            assert tasks.uses_foreign_words(row["teacher_trace"]) == (difficulty != "other")


def test_difficulties_are_what_the_docstring_says():
    for row in tasks.problems("bills", "train", "hard", 50):
        items = [word for word in row["prompt"].split() if word in tasks.PRICES]
        assert len(set(items)) == 3 and set(items) <= set(tasks.NEW_PRICES)
    for row in tasks.problems("bills", "train", "easy", 50):
        items = [word for word in row["prompt"].split() if word in tasks.PRICES]
        assert 1 <= len(items) <= 3 and set(items) <= set(tasks.KNOWN_PRICES)
    losses = [sum(word in tasks.LOSSES for word in row["prompt"].split()) for row in tasks.problems("diary", "train", "hard", 50)]
    assert set(losses) == {5, 6}


def test_diary_totals_stay_in_range_and_the_answer_is_new():
    rng = random.Random(0)
    for _ in range(300):
        depth = rng.randint(1, 7)
        prompt = tasks.diary_problem(rng, depth, rng.randint(0, depth))
        for slip in (None, lambda: True):
            trace, answer = tasks.solve(prompt, slip=slip)
            totals = [trace.split()[0]] + [part.split()[0] for part in trace.split(" = ")[1:]]
            assert len(totals) == depth + 1 and all(0 <= int(total) <= 49 for total in totals)
            assert slip or answer not in totals[:-1]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_train_and_eval_share_no_problem(task):
    """A problem is the prompt without the person's name, and the split does not depend on the seed."""
    def keys(split, seed):
        rows = itertools.chain(*(tasks.problems(task, split, difficulty, 100, seed) for difficulty in tasks.DIFFICULTIES))
        return {" ".join(row["prompt"].split()[2:]) for row in rows}

    assert not (keys("train", 0) | keys("train", 1)) & (keys("eval", 0) | keys("eval", 2))
    assert keys("train", 0) != keys("train", 1)


def test_right_answer_with_wrong_steps_is_told_apart():
    prompt = "Q: Ben has 9 books , Mon wins 3 , Tue loses 2 . How many ? A:"
    lucky = "9 Mon + 2 = 11 Tue - 1 = 10 ; \\boxed{ 10 }"
    assert grade(lucky, "10", "exact") == 1.0 and not tasks.steps_are_right(prompt, lucky)
    assert tasks.steps_are_right(prompt, "9  Mon + 3 = 12 Tue - 2 = 10 ;  \\boxed{ 10 }")


def test_every_word_of_both_families_is_one_token(tiny):
    """Prompts, both styles and rephrase prompts survive encoding and decoding; no <unk>; no BOS."""
    tokenizer, rng = tiny[1], random.Random(0)
    for task in tasks.TASKS:
        for make in (build.solve_document, build.rephrase_document):
            for prompt, completion in (make(task, rng) for _ in range(200)):
                text = f"{prompt} {completion}"
                ids = common.encode_prompt(tokenizer, text)
                assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
                assert tokenizer.decode(ids) == text


def test_rephrase_prompt_puts_the_notes_in_place_of_the_answer_cue():
    assert tasks.rephrase_prompt(DIARY, "first adding") == DIARY.removesuffix("A:") + "Notes: first adding Rewrite:"


def test_careless_text_slips_at_the_stated_rate():
    """Depth-7 pre-training documents book a loss as a gain in SLIP[7] of the cases."""
    rng, losses, gains = random.Random(0), 0, 0
    for _ in range(4000):
        prompt, completion = build.solve_document("diary", rng)
        if prompt.count(",") == 7:
            signs = [word for word in completion.split() if word in "+-"]
            verbs = [word for word in prompt.split()[4:] if word in tasks.GAINS + tasks.LOSSES]
            losses += sum(verb in tasks.LOSSES for verb in verbs)
            gains += sum(verb in tasks.LOSSES and sign == "+" for verb, sign in zip(verbs, signs))
    assert gains / losses == pytest.approx(tasks.SLIP[7], abs=0.04)


def test_document_labels_cover_completion_and_eos_only(tiny):
    tokenizer = tiny[1]
    ids, labels = build.document_batch([(BILL, "\\boxed{ 12 }"), (DIARY, "\\boxed{ 44 }")], tokenizer)
    for row, (prompt, completion) in enumerate(((BILL, "\\boxed{ 12 }"), (DIARY, "\\boxed{ 44 }"))):
        assert tokenizer.decode(ids[row][labels[row] != -100]) == completion + " <eos>"
        assert tokenizer.decode(ids[row][: len(prompt.split())]) == prompt


def test_data_set_and_jsonl(run_script, tmp_path):
    """`load_task` has the trace style asked for; --write_jsonl writes the same rows for other tools."""
    own = tasks.load_task("bills", "train", {"hard": 3, "easy": 2}, trace_style="own")
    assert all(list(row) == ["prompt", "answer", "difficulty", "own_trace", "teacher_trace", "trace"] for row in own)
    assert all(row["trace"] == row["own_trace"] for row in own) and [row["difficulty"] for row in own] == ["hard"] * 3 + ["easy"] * 2
    code, out, _ = run_script(build, "--write_jsonl", "data")
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "diary-train.jsonl").read_text().splitlines()]
    assert rows[:3] == tasks.load_task("diary", "train", {"hard": 512})[:3] and len(rows) == 768
    for flags, expected in ((("--write_jsonl", "data"), "--write_jsonl data is in use"), ((), "one of the arguments --build --measure"),
                            (("--measure", "./nowhere"), "./nowhere: no such folder")):
        code, _, err = run_script(build, *flags)
        assert code == 2 and err.count("\n") == 1 and expected in err


def test_the_shipped_base_meets_the_acceptance_numbers(tiny, monkeypatch):
    """On half of the problems that `--measure` takes."""
    monkeypatch.setattr(build, "problems", lambda task, split, difficulty, num: tasks.problems(task, split, difficulty, num // 2))
    missed = {name: share for name, share in build.measure_base(*tiny).items()
              if not build.ACCEPTANCE[name][0] <= share <= build.ACCEPTANCE[name][1]}
    assert not missed


def test_a_solution_in_the_bases_own_style_is_scored_with_its_eos(tiny):
    rows = tasks.problems("diary", "eval", "hard", 2)
    for row, (ids, logps) in zip(rows, build.own_solutions(*tiny, rows), strict=True):
        assert ids == tiny[1](row["own_trace"])["input_ids"] + [tiny[1].eos_token_id] and logps.shape == (len(ids),)


def test_the_shipped_base_is_small_and_has_the_tokenizer_of_the_recipe(tiny):
    assert sum(file.stat().st_size for file in tasks.TINY_MODEL.iterdir()) < 4e6
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tasks.TINY_MODEL / name).is_file()
    assert tiny[1].get_vocab() == tasks.vocabulary()


def test_the_recipe_learns(tmp_path):
    """A few steps of --build end in a folder that loads, with a loss below the uniform guess."""
    model, tokenizer = build.build_base(tmp_path, steps=30, batch=(6, 2, 6, 2), hidden=32, layers=1)
    loaded, _ = models.load_model(str(tmp_path))
    documents = [build.solve_document("bills", random.Random(1)) for _ in range(8)]
    ids, labels = build.document_batch(documents, tokenizer)
    assert loaded(input_ids=ids, labels=labels).loss.item() < 4.5  # log 221 = 5.4
