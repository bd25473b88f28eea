"""The report shows what is in the directory, as text, and asks nobody for anything."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from guerdon.errors import ConfigError
from guerdon.evaluation.metrics import Evaluation
from guerdon.evaluation.trials import Progress
from guerdon.report.html import write_report
from guerdon.training.rundir import RunDir

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.text += data
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data)


def make_run(directory, *, method="dpo", seed=0, slope=1.0, score=0.5, done=True, samples=True):
    run = RunDir.create(directory, method, {"beta": 0.1}, {"model": EVIL, "data": "pairs.jsonl", "seed": seed})
    for step in range(1, 21):
        share = step / 20
        row = {
            "loss/total": float("nan") if step == 7 else 0.69 - 0.3 * share,
            "preference/margin": 2 * share,
            "policy/logp_chosen": -20 - 10 * share * slope,
            "progress/samples": 32 * step,
            "progress/tokens": 1000 * step,
            "optim/lr": 1e-5,
        }
        if step % 5 == 0:
            row["eval/preference/accuracy"] = 0.5 + share * (score - 0.5) + 0.01 * seed
        run.append(step, row)
    if samples:
        rows = [
            {
                "round": 0,
                "step": step,
                "prompt": prompt,
                "completions": [f"{EVIL} {step}", "fine"],
                "rewards": [0.25, 1],
            }
            for step in (0, 20)
            for prompt in (EVIL, [{"role": "user", "content": "as messages"}])
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"round": 1, "st'  # torn by a kill
        (run.path / "samples.jsonl").write_text(text)
    rng = np.random.default_rng(seed)
    right = (rng.random(60) < score).astype(float)
    if done:
        run.set_status("done")
        save_evaluation(directory, right)
    return run


def save_evaluation(directory, right):
    directory.mkdir(parents=True, exist_ok=True)
    keys = [f"item {i}" for i in range(len(right))]
    metrics = {"preference/accuracy": right, "kl": np.linspace(0, 1, len(right))}
    Evaluation(keys, metrics, "preference/accuracy", {"samples": 4}).save(directory / "evaluation.json")


@pytest.fixture
def comparison(tmp_path):
    """Two methods with two seeds; one trial failed; every name that a user gives is hostile."""
    label = f"B {EVIL}"
    name = "dpo"
    methods = [{"label": "plain", "name": name, "options": {}}, {"label": label, "name": name, "options": {"beta": 1}}]
    settings = {
        "methods": methods,
        "training": {"model": EVIL, "data": EVIL},
        "seeds": 2,
        "budget": {"updates": 20},
    }
    content = {"settings": settings, "command": f"guerdon compare '{EVIL}'", "looks": []}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    trials = tmp_path / "trials"
    save_evaluation(trials / "base" / "seed-0", np.zeros(60))
    Progress("done").save(trials / "base" / "seed-0")
    from guerdon.evaluation.compare import _folder

    for folder, score, slope in (("plain", 0.9, 1.0), (_folder(label), 0.6, -1.0)):
        for seed in range(2):
            directory = trials / folder / f"seed-{seed}"
            failed = folder != "plain" and seed == 1
            make_run(directory, seed=seed, score=score, slope=slope, done=not failed)
            progress = (
                Progress("failed", error=f"train: exit status 1\n{EVIL}") if failed else Progress("done", 3.0, 120.0)
            )
            progress.save(directory)
    return tmp_path


def test_everything_that_a_model_or_a_user_wrote_is_text(comparison):
    html = write_report(comparison).read_text()
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags
    assert not [a for a in page.attributes if a[0].startswith("on")]
    # prompt, completions, label, model, data, command and the error are all there, as they were written
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert f"train: exit status 1\n{EVIL}" in page.text
    assert f"guerdon compare '{EVIL}'" in page.text


def test_the_page_asks_for_nothing_outside(comparison):
    page = Page(write_report(comparison).read_text())
    assert not {"link", "iframe", "object", "script", "a"} & set(page.tags)
    assert not [a for a in page.attributes if a[0] in ("src", "href", "srcset", "action")]
    policy = [value for name, value in page.attributes if name == "content" and value and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_a_comparison_says_its_verdict_first_and_shows_what_it_rests_on(comparison):
    html = write_report(comparison).read_text()
    page = Page(html)
    from guerdon.evaluation.compare import load_comparison

    verdict = load_comparison(comparison).verdict
    assert all(sentence in page.text for sentence in verdict)
    assert page.text.index(verdict[0]) < page.text.index("Results")
    assert page.headings == [
        "Results", "Pair by pair", "Failed trials", "Cost of a trial", "Curves", "Samples", "Facts", "Again",
    ]  # fmt: skip
    assert "1 of 2" in page.text and "seed 1" in page.text
    assert "as messages" in page.text and "update 20" in page.text
    assert "untrained start update 0" in " ".join(page.text.split())
    assert "2.0 min" in page.text and "20,000" in page.text  # CPU and tokens of a trial
    assert "1 values were not finite" in page.text or "4 values were not finite" in page.text
    assert html.count('class="by-step"') == html.count('class="by-samples"') >= 4


def test_falling_log_probs_are_explained_where_they_fall(comparison):
    text = Page(write_report(comparison).read_text()).text
    assert "plain: the log-prob of the better answers falls while the margin rises" in text
    assert text.count("falls while the margin rises") == 1


def test_a_run_has_a_page_too(tmp_path):
    make_run(tmp_path / "run", score=0.8)
    target = write_report(tmp_path / "run", tmp_path / "page.html")
    assert target == tmp_path / "page.html"
    page = Page(target.read_text())
    assert "dpo finished after 20 updates." in page.text
    assert "on 60 held-out items" in page.text and "One run is no result about the method" in page.text
    assert page.headings == ["Held-out metrics", "Curves", "Samples", "Facts", "Again"]
    assert "guerdon.train(" in page.text and "beta=0.1" in page.text


def test_a_failed_run_shows_its_error(tmp_path):
    run = make_run(tmp_path / "run", done=False, samples=False)
    run.set_status("failed", error=EVIL)
    page = Page(write_report(tmp_path / "run").read_text())
    assert "dpo failed after 20 updates." in page.text and "It has not been evaluated" in page.text
    assert "Failed trials" in page.headings and EVIL in page.text and "img" not in page.tags


def test_a_comparison_without_a_finished_trial_has_a_page(comparison):
    import shutil

    shutil.rmtree(comparison / "trials")
    page = Page(write_report(comparison).read_text())
    assert "No method has a finished trial: nothing can be said yet." in page.text
    assert page.headings == ["Facts", "Again"]


def test_neither_run_nor_comparison(tmp_path):
    with pytest.raises(ConfigError, match="holds no run and no comparison"):
        write_report(tmp_path)
    make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(tmp_path / "run", tmp_path / "nowhere" / "page.html")
