"""benchmarks/quality.py: answers, what they are compared with, resuming, and the page that follows from them."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
import quality
import quality_page
import torch
from quality import Job, answer_logits, divergence, greedy, is_right
from quality_cells import Interval, Place, by_place, mean_difference, paired, ratio
from quality_store import Answer, Setting, Store
from retriever.tasks import TASKS, correct, problem

import kvfx
from kvfx.demo import run
from kvfx.policy import Policy

POLICIES = ("--policies", "compactor", "knorm@kvpress")
SETTING = Setting("knorm", 0.5, "-knorm | budget=uniform(0.5)", "weights", "problems", "here")


def made(setting=SETTING, index=0, right=1):
    return Answer(setting.digest, "trace", 64, index, right, kl=0.5, gold=1.0, bytes=8)


def options(folder, *more):
    small = ("--lengths", "128", "--questions", "2", "--keeps", "0.5", "--tasks", "single", "multivalue", "--processes", "1")
    return [*small, "--name", "small", "--folder", str(folder), *more]


@pytest.fixture(scope="module")
def model():
    return run.load()[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a run writes; 12 questions."""
    folder = tmp_path_factory.mktemp("results")
    quality.main(options(folder, *POLICIES))
    return folder


# -- one answer ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != "multivalue"])
def test_an_answer_is_right_if_greedy_decoding_says_just_that(model, task):
    compressed = kvfx.compile(model, "streaming_llm:0.6", backend="eager")
    problems = [problem(task, 128, 5, index) for index in range(12)]
    cache = compressed.compress(torch.tensor([one.context for one in problems]))
    right = [is_right(one, logits) for one, logits in zip(problems, answer_logits(compressed, cache, problems), strict=True)]
    said = greedy(compressed, cache, problems).tolist()
    assert right == [correct(one, ids) for one, ids in zip(problems, said, strict=True)]


@pytest.mark.slow
def test_logits_of_an_answer_are_those_of_the_plain_model(model):
    problems = [problem("multikey", 128, 5, index) for index in range(3)]
    whole = kvfx.compile(model, "none", backend="eager")
    found = answer_logits(whole, whole.compress(torch.tensor([one.context for one in problems])), problems)
    for one, logits in zip(problems, found, strict=True):
        with torch.no_grad():
            plain = model(torch.tensor([one.context + one.question + one.answer[:-1]])).logits[0, -len(one.answer) :]
        torch.testing.assert_close(logits, plain, rtol=0, atol=1e-4)


def test_the_divergence_is_that_of_torch_and_none_from_oneself():
    full, found = torch.randn(3, 7), torch.randn(3, 7)
    expected = torch.nn.functional.kl_div(found.log_softmax(-1), full.log_softmax(-1), reduction="batchmean", log_target=True)
    assert divergence(full, found) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(full, full) == 0


@pytest.mark.slow
def test_the_full_cache_is_at_no_distance_and_keeps_all_the_gold():
    _, answers = quality.answer(Job(quality.setting("none", 1.0), "trace", 128, (0, 1)))
    assert [(each.kl, each.gold, each.index) for each in answers] == [(0, 1, 0), (0, 1, 1)]


def test_the_parts_of_compactor_differ_from_it_in_the_score_alone():
    whole, alone = Policy.parse("compactor"), quality.parts()
    assert {name: str(policy.score) for name, policy in alone.items()} == {
        "leverage only": str(next(atom for atom in whole.atoms() if atom.name == "leverage")),
        "attention only": str(next(atom for atom in whole.atoms() if atom.name == "attn")),
    }
    assert {replace(policy, score=whole.score) for policy in alone.values()} == {whole}


# -- resuming ------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_has_nothing_left_to_answer(results, monkeypatch):
    monkeypatch.setattr(quality, "answer", lambda job: pytest.fail(f"{job} was answered before"))
    before = (results / "small.jsonl.gz").read_bytes()
    quality.main(options(results, *POLICIES))
    assert (results / "small.jsonl.gz").read_bytes() == before


def test_a_run_goes_on_where_another_was_killed(results, tmp_path):
    lines = gzip.decompress((results / "small.jsonl.gz").read_bytes()).decode().splitlines(keepends=True)
    (tmp_path / "small.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])
    quality.main(options(tmp_path, *POLICIES))
    assert (tmp_path / "small.jsonl.gz").read_bytes() == (results / "small.jsonl.gz").read_bytes()


def test_a_line_that_is_torn_is_dropped_and_one_that_is_damaged_is_named(tmp_path):
    store = Store("a", tmp_path)
    store.add(SETTING, [made(index=0), made(index=1)])
    with store.path.open("a") as file:
        file.write('{"at":"x","ta')
    assert len(Store("a", tmp_path).answers) == 2
    assert store.path.read_text().endswith("}\n")
    store.path.write_text('{"at":"x"}\n' + store.path.read_text())
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 is no result: .*Mend or remove it"):
        Store("a", tmp_path)


def test_packed_answers_are_sorted_and_are_enough_to_go_on(tmp_path):
    other = replace(SETTING, keep=0.25, text="-knorm | budget=uniform(0.25)")
    first, second = Store("a", tmp_path), Store("b", tmp_path)
    first.add(SETTING, [made(index=1), made(index=0)])
    first.add(other, [made(other)])
    second.add(other, [made(other)])
    second.add(SETTING, [made(index=0), made(index=1)])
    assert gzip.decompress(first.pack().read_bytes()) == gzip.decompress(second.pack().read_bytes())
    assert not first.path.exists()
    again = Store("a", tmp_path)
    assert again.has(SETTING, "trace", 64, 1)
    again.add(SETTING, [made(index=2)])
    assert len(Store("a", tmp_path).answers) == 4


def test_answers_of_other_weights_or_other_numbers_of_a_policy_are_forgotten(tmp_path):
    store = Store("a", tmp_path)
    store.add(SETTING, [made()])
    assert not store.has(replace(SETTING, weights="others"), "trace", 64, 0)
    store.forget_all_but(lambda policy, keep: SETTING)
    assert len(store.answers) == 1
    store.forget_all_but(lambda policy, keep: replace(SETTING, text="-knorm | budget=uniform(0.5) | protect(sinks=4)"))
    assert store.answers == {}


def test_variants_are_asked_little_and_what_is_claimed_much():
    lengths = (512, 1024, 2048)
    for name in (quality.BASE, *quality.parts()):
        assert all(quality.questions_of(name, tokens, lengths) * len(TASKS) >= 400 for tokens in (512, 1024))
    assert quality.questions_of("snapkv@kvpress", 1024, lengths) == 0
    assert quality.questions_of("snapkv@kvpress", 512, lengths) > 0


# -- what they say together ----------------------------------------------------------------------------------------------------


def test_differences_are_of_the_questions_that_both_answered():
    one, other = Place("a", 0.5, "trace", 64), Place("b", 0.5, "trace", 64)
    places = {one: [made(index=0, right=1), made(index=1, right=0)], other: [made(index=1, right=1), made(index=2, right=1)]}
    assert paired(places, one, other).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="no question in common"):
        paired(places, one, Place("c", 0.5, "trace", 64))


def test_intervals_are_as_wide_as_the_normal_approximation_says():
    rows = np.random.default_rng(1).integers(0, 2, (400, 2)).astype(float)
    found, wanted = mean_difference([rows]), (rows[:, 0] - rows[:, 1])
    assert found.value == pytest.approx(wanted.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * wanted.std() / 20, rel=0.05)
    two = mean_difference([rows, rows])
    assert two.high - two.low == pytest.approx((found.high - found.low) / 2**0.5, rel=0.05)
    assert ratio([rows]).value == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    assert ratio([np.ones((5, 2))]) == (1, 1, 1)


def test_a_goal_is_met_only_by_the_whole_interval():
    assert [Interval(0.98, low, 1).at_least(0.97) for low in (0.975, 0.97, 0.96)] == ["met", "met", "undecided"]
    assert Interval(0.9, 0.8, 0.96).at_least(0.97) == "not met"
    assert [Interval(0, low, high).above(0) for low, high in ((0.01, 1), (0, 1), (0, 0))] == ["met", "undecided", "not met"]


def test_a_run_writes_answers_cells_and_pictures(results):
    assert {file.name for file in results.iterdir()} >= {"small.jsonl.gz", "small.csv", "small.png", "small.svg"}
    store = Store("small", results)
    assert len(store.answers) == 12
    cells = (results / "small.csv").read_text().splitlines()
    assert len(cells) == 1 + 2 * 3
    page = quality_page.page(store)
    assert "compactor:0.5 answers 97 % of what the full cache does, single" in page
    assert "| compactor | 4 |" in page


def test_without_results_there_is_no_page(tmp_path):
    with pytest.raises(SystemExit, match="run the benchmark first"):
        quality.main(options(tmp_path, "--page-only"))


# -- the committed results -----------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_committed_answers_say():
    store = Store(quality_page.NAME)
    assert quality_page.page(store) == quality_page.PAGE.read_text(), "run: python benchmarks/quality.py --page-only"
    assert quality_page.cells_csv(store) == (quality.RESULTS / "quality.csv").read_text()


def test_the_committed_answers_are_those_of_the_packaged_model_and_of_todays_policies():
    for setting in Store(quality_page.NAME).settings.values():
        today = quality.setting(setting.policy, setting.keep)
        assert today == setting, f"{setting.policy}:{setting.keep} has changed since; run: python benchmarks/quality.py"
    assert by_place(Store(quality_page.NAME))
