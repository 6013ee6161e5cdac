"""Does report.html show a run, whatever its model wrote, in light and dark, on any width, and without a request to anywhere?"""

import contextlib
import html.parser
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

import engine
import grpo
import luffy
import prefixrl
import repo
from browser import Page, needs_browser, open_page
from engine import models, report, rollouts
from methods import logps_without_padding

SMALL = ("--max_steps", "2", "--eval_steps", "1", "--eval_problems", "4", "--prompts_per_step", "3", "--num_generations", "4",
         "--num_hard", "8", "--num_easy", "8", "--save_completions_steps", "1")
HOSTILE = ["<script>window.owned = 1</script><img src=//evil.invalid/x onerror=owned=1>",
           "</div></details></body>\"' onload=owned=1 <!-- <style>",
           "\x00\x1b[2J\x07 \u202eright to left\u202c \u200f \ud800 lone \udfff", "(content) (policy) &lt;b&gt; &#60; \\u202e",
           "x" * 100_000,
           "שלום العربية 日本語 🎉 a\u0301" + "\u0300" * 300, "", "\n" * 50, "a\r\nb\u2028c\u2029d\x85e"]


def run(module, folder, *flags):
    """A script's main in this process; returns what it wrote on screen."""
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
        patch.setattr(sys, "argv", [module.__file__, *SMALL, "--output_dir", str(folder), *map(str, flags)])
        engine.launch(module.main)
    return screen.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: (run folder, its screen)} of short runs, a retelling, a teacher's row and a prefix among their rollouts."""
    folder = tmp_path_factory.mktemp("runs")
    short = ("--eval_steps", 0, "--max_steps", 1)
    flags = {repo: (), luffy: short, prefixrl: (*short, "--num_hard", 64, "--num_easy", 0, "--prefixed_only")}
    return {module.__name__: (folder / module.__name__, run(module, folder / module.__name__, *flags[module])) for module in flags}


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the run of repo.py that a test may change, without its models."""
    return Path(shutil.copytree(runs["repo"][0], tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "report.html")))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(monkeypatch, capsys, *words):
    """`python -m engine.report` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    code = 0
    try:
        report.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


class Markup(html.parser.HTMLParser):
    """The elements of a page, the names of their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.words = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.words += data


# ---------------------------------------------------------------- what it shows


def test_a_run_writes_its_report_and_the_command_writes_the_same(runs, monkeypatch, capsys):
    folder, _ = runs["repo"]
    text = (folder / "report.html").read_text()
    code, out, err = command(monkeypatch, capsys, folder)
    assert (code, out, err) == (0, f"wrote {folder / 'report.html'}\n", "") and (folder / "report.html").read_text() == text
    words = Markup(text).words
    keys = {key for line in lines_of(folder / "metrics.jsonl") for key, value in line.items() if value is not None}
    drawn = {key.split("/", 1)[-1] for key in keys if key != "step" and not key.endswith("_se")}
    assert all(f"{name}" in words for name in drawn) and len(drawn) > 40 and text.count("<figure>") == len(keys - {"step"}) - sum(
        key.endswith("_se") for key in keys)
    assert text.count('class="error"') == sum(key.endswith("_se") and any(
        line.get(key) for line in lines_of(folder / "metrics.jsonl")) for key in keys)  # error bars, where the error is not 0
    assert "<td>num_hard</td><td>8</td><td>512</td>" in text and "<td>learning_rate</td>" not in text
    assert all(f"<td>{phase}</td>" in text for phase in ("rollout", "train", "rephrase"))
    assert len(text) < 1_000_000


def test_a_retelling_stands_beside_its_trace(runs):
    folder, _ = runs["repo"]
    (told, *_) = [line for line in lines_of(folder / "completions" / "step-000002.jsonl") if line["source"] != "rollout"]
    assert told["source"] == "rephrase" and told["trace"] != told["completion"]
    text = (folder / "report.html").read_text()
    shared = set(told["completion"].split()) & set(told["trace"].split())
    assert str(report.marked(told["completion"], told["trace"])) in text and str(report.marked(told["trace"], told["completion"])) in text
    assert Markup(report.marked(told["completion"], told["trace"])).elements.count("mark") == sum(
        word in shared for word in told["completion"].split())


def test_tokens_of_a_teacher_have_their_weight(runs):
    folder, _ = runs["luffy"]
    (line, *_) = [line for line in lines_of(folder / "completions" / "step-000001.jsonl") if line["source"] == "trace"]
    markup = report.tokens(line, 0.1)
    assert str(markup) in (folder / "report.html").read_text()
    weights = [float(part.split("</rt>")[0]) for part in str(markup).split("<rt>")[1:]]
    probs = [math.exp(logp) for logp in line["logps"]]
    assert weights == [pytest.approx(prob / (prob + 0.1), abs=0.0051) for prob in probs] and min(weights) < 0.2 < 0.9 < max(weights)
    assert "<ruby" not in report.tokens(line | {"source": "rollout"}, 0.1) and "<ruby" not in report.tokens(line, 0)


def test_a_prefix_is_set_off(runs):
    folder, _ = runs["prefixrl"]
    text, (line, *_) = (folder / "report.html").read_text(), lines_of(folder / "completions" / "step-000001.jsonl")
    assert line["completion"].startswith(line["prefix"]) and line["prefix"]
    own = line["completion"][len(line["prefix"]) :]
    assert f'<span class="prefix" title="given, not trained">{report.text(line["prefix"])}</span>{report.text(own)}</div>' in text


@pytest.mark.fast
def test_completions_stand_by_advantage_and_equal_ones_once():
    line = rollouts.OLDER | {"prompt": "q", "answer": None}
    rows = [line | {"completion": text, "reward": reward, "advantage": advantage}
            for text, reward, advantage in (("bad", 0.0, -0.6), ("good", 1.0, 1.7), ("bad", 0.0, -0.6), ("cut", None, None))]
    rows[3]["ended"] = False
    shown = str(report.group(rows, 0, True))
    assert shown.index("good") < shown.index("cut") < shown.index("bad") and shown.count("bad") == 1
    assert "row up2" in shown and "row down1" in shown and "2 × the same".replace("×", "&#215;") in shown and "cut off" in shown


def test_the_line_on_screen_says_what_a_person_asks(runs):
    line = runs["repo"][1].replace("\r", "\n").split("step 2/2 |")[1].split("\n")[0]
    for words in ("00:00 left, reward 0.", "solved: easy 100%, hard 0%, other 100%", "no signal in 100% of groups"):
        assert words in line


# ---------------------------------------------------------------- log-probs


def test_the_log_probs_are_those_of_the_policy_after_the_step(runs):
    """At the last step that is the saved model."""
    folder, _ = runs["repo"]
    model, tokenizer = models.load_model(folder)
    for line in lines_of(folder / "completions" / "step-000002.jsonl")[:6]:
        ids = [tokenizer.convert_tokens_to_ids(piece.strip()) for piece in line["tokens"]]
        assert "".join(line["tokens"][:-1]) == line["completion"] and line["ended"]
        expected = logps_without_padding(model, tokenizer(line["prompt"])["input_ids"], ids)
        assert line["logps"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_saving_rollouts_changes_no_weight(runs, tmp_path):
    run(repo, tmp_path / "without", "--save_completions_steps", 0)
    without, with_them = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "without", runs["repo"][0]))
    assert without == with_them and not (tmp_path / "without" / "completions").exists()


@pytest.mark.fast
def test_characters_of_many_tokens_are_shown_whole(byte_tokenizer, tiny):
    text = "né 日本🎉 x"
    ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = rollouts.token_pieces(byte_tokenizer, ids)
    assert "".join(pieces) == text and len(pieces) == len(ids) and [piece for piece in pieces if piece] == list(text)
    assert "".join(rollouts.token_pieces(byte_tokenizer, ids[3:], ids[:3])) == " 日本🎉 x"
    torn = rollouts.token_pieces(byte_tokenizer, ids[:5])  # ends within a character
    assert len(torn) == 5 and "".join(torn).startswith("né ")
    words = tiny[1]("2 ink at 4", add_special_tokens=False)["input_ids"]
    assert rollouts.token_pieces(tiny[1], words[1:], words[:1]) == [" ink", " at", " 4"]


# ---------------------------------------------------------------- hostile folders


@pytest.fixture
def hostile(copied):
    """A folder whose every text is hostile, with null, huge and strange numbers."""
    lines = [{"prompt": text, "answer": text, "completion": other, "ended": False, "reward": reward, "advantage": advantage,
              "source": text, "prefix": text[:5], "trace": other, "tokens": [other, text] * 3, "logps": [None, -1e299, 0, 5, -0.1, -2]}
             for text, other in zip(HOSTILE, HOSTILE[1:] + HOSTILE[:1])
             for reward, advantage in ((1e299, -1e299), (None, None), (10**200, 0))]
    (copied / "completions" / "step-000002.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((copied / "args.json").read_text())
    record["args"] |= {text: text for text in HOSTILE} | {"max_steps": HOSTILE[0], "num_generations": HOSTILE[0],
                                                              "shaping": "shaped", "shaping_gamma": -1}
    record |= {"script": HOSTILE[1], "git_commit": HOSTILE[2], "defaults": {text: HOSTILE for text in HOSTILE}}
    (copied / "args.json").write_text(json.dumps(record))
    metrics = [{"step": step, "flops/<b>": value, "flops/train": -1} | {text: value for text in HOSTILE}
               | {f"eval/{text}/avg@1": value for text in HOSTILE}
               for step, value in enumerate((None, 1e299, -1e299, 10**250, 0.0, 2**70))]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 9, "rew')  # being written
    return copied


def test_hostile_output_is_text(hostile, runs):
    report.write_report([hostile])
    text = (hostile / "report.html").read_text()
    plain, found = Markup((runs["repo"][0] / "report.html").read_text()), Markup(text)
    assert set(found.elements) <= set(plain.elements) | {"ruby", "rt", "b"} and found.elements.count("script") == 1
    assert found.attributes <= plain.attributes | {"open"} and text.isascii() and len(text) < 5_000_000
    for shown in ("<script>window.owned = 1</script>", "\\x1b[2J\\x07 \\u202eright to left", "\\ud800 lone \\udfff", "(content) (policy)",
                  "a\\r\nb\\u2028c\\u2029d\\x85e", "more characters", "日本語 🎉"):
        assert shown in found.words
    assert "x" * 4001 not in text and found.words.count("96,000 more characters") > 3


@needs_browser
def test_hostile_output_is_text_in_a_browser(hostile):
    page = Page(report.write_report([hostile]), 400, dark=True)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.console() == [] and page.requests() == [] and page.too_wide() <= 0 and page.low_contrast() == []
    assert page.evaluate("typeof owned") == "undefined"
    assert page.evaluate("document.querySelectorAll('img, a, iframe, object, form, base, link').length") == 0
    assert page.evaluate("document.body.innerText.includes('<script>window.owned = 1</script>')")


def test_what_an_older_run_did_not_write_is_not_needed(copied):
    for path in copied.glob("completions/*"):
        kept = ("prompt", "answer", "completion", "reward", "advantage")
        path.write_text("".join(json.dumps({name: line[name] for name in kept}) + "\n" for line in lines_of(path)))
    record = json.loads((copied / "args.json").read_text())
    del record["defaults"], record["args"]["explain"]
    (copied / "args.json").write_text(json.dumps(record))
    text = report.write_report([copied]).read_text()
    assert "<td>num_hard</td><td>8</td><td>512</td>" in text and '<div class="row' in text and "<details class=\"tokens" not in text


def test_a_run_that_has_just_begun_has_a_report(copied):
    shutil.rmtree(copied / "completions")
    (copied / "metrics.jsonl").unlink()
    assert "no step is logged yet" in report.write_report([copied]).read_text()


DAMAGES = {
    "no folder": lambda run: shutil.rmtree(run),
    "no args.json": lambda run: (run / "args.json").unlink(),
    "args.json is no JSON": lambda run: (run / "args.json").write_text("{"),
    "args.json is a list": lambda run: (run / "args.json").write_text("[]"),
    "a metric is a text": lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "reward": "1"}\n'),
    "deep": lambda run: (run / "metrics.jsonl").write_text("[" * 100_000 + "\n"),
    "a prompt is a number": lambda run: (run / "completions" / "step-000001.jsonl").write_text('{"prompt": 1}\n'),
    "a log-prob is a list": lambda run: (run / "completions" / "step-000001.jsonl").write_text(
        '{"prompt": "", "completion": "", "reward": 0, "advantage": 0, "tokens": [""], "logps": [[]]}\n'),
    "rollouts are a link": lambda run: (os.replace(run / "completions" / "step-000001.jsonl", run / "x"),
                                        (run / "completions" / "step-000001.jsonl").symlink_to(run / "x")),
    "completions/ is a link": lambda run: (os.replace(run / "completions", run / "x"), (run / "completions").symlink_to(run / "x")),
    "rollouts are a FIFO": lambda run: os.mkfifo(run / "completions" / "step-000003.jsonl"),
    "the report is a folder": lambda run: (run / "report.html").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(copied, monkeypatch, capsys, damage):
    DAMAGES[damage](copied)
    code, out, err = command(monkeypatch, capsys, copied)
    assert code in (1, 2) and out == "" and err.startswith("report: error: ") and err.count("\n") == 1 and str(copied) in err
    assert not (copied / "report.html").is_file()


def test_what_is_long_is_cut_with_a_count(copied):
    (line, *_) = lines_of(copied / "completions" / "step-000001.jsonl")
    line |= {"tokens": ["token "] * 1200, "logps": [-1.0] * 1200}
    for step in range(1, 121):
        groups = range(66 if step == 120 else 1)
        lines = [line | {"prompt": f"q{group}", "completion": f"{row} " * 2500} for group in groups for row in "ab"]
        path = copied / "completions" / f"step-{step:06d}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with (copied / "metrics.jsonl").open("a") as file:
        for step in range(3, 3000):
            file.write(json.dumps({"step": step, "reward": 0.5} | ({f"more/{i}": 1 for i in range(400)} if step == 3 else {})) + "\n")
    text = report.write_report([copied]).read_text()
    assert len(text) < 5_000_000 and text.count("<figure>") == 300
    for words in ("more metrics are left out", "more steps of completions/ are left out", "2 more groups are left out",
                  "200 more tokens are left out", "1,000 more characters", "every 6th of 2,999 points"):
        assert words in text


# ---------------------------------------------------------------- several runs, and the end of a run


def test_an_evaluation_has_its_error_bars():
    """From 0.4 to 0.6 of an axis of 122 points; where no error is known there is no bar."""
    drawn = report.chart([[(0, 0.5, 0.1), (10, 0.7, None)]], whole=True)
    assert drawn.count('class="error"') == 1 and 'd="M52.0 83.2V58.8"' in drawn
    assert 'class="error"' not in report.chart([[(0, 0.5, None)]], whole=True)


def test_several_runs_share_their_curves(runs, tmp_path, monkeypatch, capsys):
    folders = [folder for folder, _ in runs.values()]
    code, _, err = command(monkeypatch, capsys, *folders, "--output_file", tmp_path / "all.html")
    text = (tmp_path / "all.html").read_text()
    reward = text.split("<figcaption>reward<")[1].split("</figure>")[0]
    assert code == 0 and reward.count("<polyline") == 3 and all(f'class="c{i}"' in reward for i in range(3)), err
    assert all(f"<h1>{folder.name}</h1>" in text for folder in folders)
    code, _, err = command(monkeypatch, capsys, *folders, "--output_file", tmp_path / "all.html")
    assert code == 2 and err == f"report: error: --output_file {tmp_path / 'all.html'} exists already\n"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_can_be_read_in_a_browser(runs, tmp_path, width, dark):
    path = report.write_report([folder for folder, _ in runs.values()], tmp_path / "all.html")
    page = Page(path, width, dark)
    page.evaluate("document.querySelectorAll('details:not(.tokens)').forEach(each => each.open = true)")
    page.evaluate("document.querySelectorAll('button').forEach(each => each.click())")
    assert page.evaluate("[...document.querySelectorAll('.tokens')].every(each => each.open)")
    assert page.low_contrast() == [] and page.too_wide() <= 0
    figure = "document.querySelector('figure')"
    page.evaluate(f"{figure}.scrollIntoView()")
    box = page.evaluate(f"(box => [box.x, box.y, box.width, box.height])({figure}.querySelector('svg').getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] * 0.9, y=box[1] + box[3] / 2)
    assert page.evaluate(f"{figure}.querySelector('output').textContent").startswith("step ")
    assert page.console() == [] and page.requests() == []


@needs_browser
def test_curves_and_rollouts_need_no_script(runs):
    page = Page(runs["repo"][0] / "report.html", script=False)
    assert page.evaluate("document.querySelector('polyline').getBoundingClientRect().width") > 100
    assert page.evaluate("[...document.querySelectorAll('.group[open] .row')].length") > 0
    assert page.evaluate("document.querySelector('button').getBoundingClientRect().width") == 0
    text, console, requests = open_page(runs["repo"][0] / "report.html")
    assert "Rollouts" in text and console == [] == requests


def test_a_report_that_fails_loses_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "page", lambda folders: 1 / 0)
    screen = run(grpo, tmp_path / "run", "--max_steps", 1, "--eval_steps", 0)
    assert "warning: no report.html: ZeroDivisionError: division by zero" in screen and (tmp_path / "run" / "model.safetensors").exists()
    assert f"the records of the run are in {tmp_path / 'run'}" in screen and not (tmp_path / "run" / "report.html").exists()
