"""The packaged model's tasks and its training: problems that have one answer, runs that learn, stop, go on and export."""

import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retriever import log
from retriever.accuracy import Accuracy, greedy, right
from retriever.export import MADE, install
from retriever.recipe import RECIPE, Recipe, Stage, configuration
from retriever.run import CHECKPOINT, LOG, Run
from retriever.samples import KINDS, Mix, sample
from retriever.tasks import TASKS, correct, problem, text
from retriever.training import Group, State, batch, losses, read, train
from retriever.vocabulary import ALL, ASK, ASKS, BEGIN, NAMES, NOTE, PROSE, SET, TRACE, VALUES, WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvfx.demo.notes import MODEL

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = Recipe(stages=(Stage(3, 4, Mix(96, kinds=("note",))), Stage(3, 4, Mix(128, reach=512))), warm_up=2)


def count(words, part):
    """How often `part` stands in `words`."""
    return sum(tuple(words[index : index + len(part)]) == tuple(part) for index in range(len(words)))


# -- problems -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [256, 512, 2048])
@pytest.mark.parametrize("task", TASKS)
def test_a_context_is_exactly_as_long_as_asked_and_one_word_is_one_token(task, tokens):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    one = problem(task, tokens, seed=0, index=1)
    assert len(one.context) == tokens
    assert one.context[0] == BEGIN
    assert tuple(tokenizer(text(one.context)).input_ids) == one.context


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(("single", "multikey", "multiquery")), st.sampled_from((256, 512, 1024)), st.integers(0, 10**6))
def test_a_note_asked_for_stands_once_in_the_context_and_gold_points_at_it(task, tokens, index):
    one = problem(task, tokens, 0, index)
    names = [word for word in one.question if word in NAMES]
    assert len(names) == (2 if task == "multiquery" else 1)
    gold = [one.context[at] for at in one.gold]
    parts = [" ".join(part.split()) for part in text(one.answer).split(";")][:-1]
    for name, part in zip(names, parts, strict=True):
        note = f"note {text([name])} {part.removeprefix(text([name])).strip()} ;"
        assert count(text(one.context).split(), note.split()) == 1
        assert count(text(gold).split(), note.split()) == 1
        assert count(one.context, (NOTE, name)) == 1  # no other note on this name
        assert count(one.context, (SET, name)) == 0
    assert len(gold) == sum(len(part.split()) for part in parts) + (3 if task != "multiquery" else 2 * 2)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from((256, 512, 1024)), st.integers(0, 10**6))
def test_a_list_is_what_all_notes_on_the_name_say(tokens, index):
    one = problem("multivalue", tokens, 0, index)
    command, name = one.question
    assert command == ALL
    said = [one.context[at + 2] for at in range(tokens - 2) if one.context[at : at + 2] == (NOTE, name)]
    assert sorted(said) == sorted(one.answer[:-1])
    assert len(set(said)) == 3
    assert [one.context[at] for at in one.gold] == [word for value in said for word in (NOTE, name, value, one.answer[-1])]
    assert not one.ordered


@settings(max_examples=20, deadline=None)
@given(st.sampled_from((256, 512, 1024)), st.integers(0, 10**6))
def test_a_chain_is_followed_backwards_to_its_value(tokens, index):
    one = problem("trace", tokens, 0, index)
    assert one.question[0] == TRACE
    links = list(pairwise((one.question[1], *one.answer[:-1])))
    places = []
    for name, value in links:
        assert count(one.context, (SET, name)) == 1
        places.append(next(at for at in range(tokens) if one.context[at : at + 3] == (SET, name, value)))
    assert places == sorted(places, reverse=True)
    assert one.gold == tuple(sorted(at + offset for at in places for offset in range(4)))


def test_problems_depend_on_their_arguments_alone():
    code = "from retriever.tasks import *; print([problem(task, 256, 3, 5) for task in TASKS])"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    problem("single", 128, 0, 0)
    assert other.stdout == f"{[problem(task, 256, 3, 5) for task in TASKS]}\n"
    assert len({problem("multikey", 256, seed, index) for seed in (0, 1) for index in (0, 1)}) == 4


def test_names_and_values_are_no_sign_of_a_note():
    one = problem("multikey", 2048, 0, 0)
    stated = {word for at, word in enumerate(one.context) if one.context[at - 1] == NOTE}
    outside = [word for at, word in enumerate(one.context) if one.context[at - 1] not in (NOTE, SET) and word in NAMES]
    assert len(stated & set(outside)) > len(stated) / 2
    plain = problem("multikey", 2048, 0, 0, decoys=0)
    prose = [word for at, word in enumerate(plain.context) if word in NAMES and plain.context[at - 1] != NOTE]
    assert prose == []


def test_prose_never_gives_an_answer_away():
    for index in range(50):
        one = problem("multikey", 512, 0, index)
        gold = set(one.gold)
        rest = [word for at, word in enumerate(one.context) if at not in gold]
        assert count(rest, (one.question[-1], *one.answer[:2])) == 0


def test_values_are_shared_between_notes():
    one = problem("multikey", 1024, 0, 0)
    notes = " ".join(WORDS[word] for word in one.context).split("note ")[1:]
    values = [word for note in notes for word in note.split(" ;")[0].split()[1:]]
    assert len(values) > len(set(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "doublekey"}, "there is no task 'doublekey'; expected one of single, multikey"),
        ({"tokens": 64, "distractors": 30}, "30 distractors|facts need .* expected to fit them into 64"),
        ({"distractors": 200}, "all 160 names are taken"),
        ({"decoys": 1.5}, "decoys is 1.5; expected a share"),
    ],
)
def test_a_problem_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        problem(**({"task": "multikey", "tokens": 512, "seed": 0, "index": 0} | arguments))


def test_only_lists_may_come_in_another_order():
    for task in TASKS:
        one = problem(task, 256, 0, 0)
        assert correct(one, one.answer)
        assert correct(one, [*one.answer, 5, 6])
        assert not correct(one, one.answer[:-1])
        assert not correct(one, [*one.answer[:-1], 0])
        turned = (*reversed(one.answer[:-1]), one.answer[-1])
        assert correct(one, turned) is (task == "multivalue")


# -- samples --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from((64, 96, 128, 512, 1024)), st.sampled_from((("note",), KINDS)))
def test_a_sample_asks_only_what_its_document_says(seed, tokens, kinds):
    one = sample(random.Random(seed), Mix(tokens, kinds, reach=2304))
    assert len(one.ids) == len(one.positions) == tokens
    assert one.answers
    assert one.answers[-1] == tokens - 1
    assert one.positions[0] == 0
    assert one.positions[-1] < 2304
    assert all(before < after for before, after in pairwise(one.positions))
    begin = next(at for at, word in enumerate(one.ids) if word in (ASK, ASKS, ALL, TRACE))
    assert all(at >= begin for at in one.answers)
    document = one.ids[:begin]
    assert {one.ids[at] for at in one.prose} <= {*PROSE, *NAMES, *VALUES}
    asked = [word for word in one.ids[begin:] if word in (*NAMES, *VALUES)]
    assert set(asked) <= set(document)


def test_steps_are_the_same_samples_however_many_processes_share_them():
    alone = batch(SHORT, 4, Group())
    shared = [batch(SHORT, 4, Group(rank, 2)) for rank in (0, 1)]
    assert alone == [shared[index % 2][index // 2] for index in range(4)]
    assert batch(SHORT, 4, Group()) != batch(SHORT, 5, Group())
    assert batch(replace(SHORT, seed=1), 4, Group()) != alone


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_falls_within_a_few_steps():
    recipe = Recipe(stages=(Stage(24, 4, Mix(96, kinds=("note",))),), warm_up=4)
    measured = [one["loss"] for one in train(State.initial(recipe, "cpu"), recipe, Group())]
    assert mean(measured[-4:]) < mean(measured[:4]) - 1


def test_positions_with_gaps_see_everything_before_them():
    model = State.initial(SHORT, "cpu").model.eval()
    ids = torch.randint(16, 512, (2, 24))
    plain = torch.arange(24).expand(2, -1)
    whole = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model.lm_head(read(model, ids, plain)), whole)
    gaps = plain + 100 * (plain >= 12)
    other = ids.clone()
    other[:, 0] = 17
    assert not torch.equal(read(model, ids, gaps)[:, -1], read(model, other, gaps)[:, -1])


def test_the_loss_is_that_of_the_answers_and_not_of_questions():
    model = State.initial(SHORT, "cpu").model
    one = sample(random.Random(0), Mix(96))
    answers, _ = losses(model, [one], SHORT)
    logits = model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
    torch.testing.assert_close(answers, -torch.stack([logits[at - 1, one.ids[at]] for at in one.answers]).mean())


def test_a_run_that_was_cut_short_ends_with_the_weights_of_one_that_was_not(tmp_path):
    whole = State.initial(SHORT, "cpu")
    list(train(whole, SHORT, Group()))
    first = State.initial(SHORT, "cpu")
    list(train(first, SHORT, Group(), until=4))
    first.save(tmp_path / "state", "this")
    second = State.initial(replace(SHORT, seed=5), "cpu")
    second.load(tmp_path / "state", "this")
    assert second.step == 4
    list(train(second, SHORT, Group()))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_rates_rise_stay_and_fall():
    rates = [RECIPE.rate(step) for step in range(RECIPE.steps)]
    top = rates.index(1.0)
    assert top == RECIPE.warm_up - 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)
    with pytest.raises(IndexError, match="there is no step"):
        RECIPE.stage(RECIPE.steps)


def test_answers_are_decoded_as_generate_does():
    model = State.initial(SHORT, "cpu").model.eval()
    prompts = torch.randint(16, 512, (2, 40))
    mine = greedy(model, prompts, 5)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": torch.ones_like(prompts)}
    model.generation_config.eos_token_id = None
    assert torch.equal(mine, model.generate(prompts, **options)[:, 40:])


def test_an_interval_is_wilsons():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 0 of 20, by method 3.
    assert Accuracy("single", 512, 81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Accuracy("single", 512, 0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)


# -- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of two processes, of a few steps."""
    run = Run(
        SHORT, tmp_path_factory.mktemp("run"), "a test", processes=2, compiled=False,
        report=2, save=4, asked=2, finally_asked=3, lengths=(128,),
    )  # fmt: skip
    return run, run.start()


@pytest.mark.slow
def test_a_run_leaves_a_model_that_transformers_loads(finished):
    run, folder = finished
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    saved = torch.load(run.folder / CHECKPOINT, weights_only=True)["model"]
    assert {name: weight.half().float() for name, weight in saved.items()}.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, saved[name].half().float()) for name, weight in model.state_dict().items())
    assert (folder / "model.safetensors").stat().st_size < 8e6
    assert AutoTokenizer.from_pretrained(folder)("note k_nera").input_ids == [2, 16]


def test_two_processes_train_as_one_does_but_for_rounding(finished):
    run, _ = finished
    alone = State.initial(SHORT, "cpu")
    measured = [one["loss"] for one in train(alone, SHORT, Group())]
    shared = [record["loss"] for record in log.read(run.folder / LOG) if record["kind"] == "train"]
    assert shared == pytest.approx([mean(pair) for pair in zip(measured[::2], measured[1::2], strict=True)], rel=0.05)


def test_a_log_tells_steps_accuracy_and_where_it_ran(finished, tmp_path):
    run, folder = finished
    records = log.read(run.folder / LOG)
    assert [record["step"] for record in records if record["kind"] == "train"] == [2, 4, 6]
    assert [record["step"] for record in records if record["kind"] == "accuracy"] == [4, 6]
    (final,) = [record for record in records if record["kind"] == "final"]
    assert final["asked"] == 3
    assert set(TASKS) < set(final)
    package, results = tmp_path / "package", tmp_path / "results"
    package.mkdir(), results.mkdir()
    install(folder, run.folder / LOG, package=package, results=results)
    assert sorted(path.name for path in package.iterdir()) == sorted(MADE)
    written = (results / "retriever_training.md").read_text()
    assert "`a test` on 2 process(es) on" in written
    assert "6 steps (all of its steps)" in written
    assert f"{final['single']}/3" in written


def test_a_finished_run_trains_no_further_and_a_checkpoint_of_another_recipe_is_refused(finished):
    run, _ = finished
    before = (run.folder / CHECKPOINT).read_bytes()
    one = replace(run, processes=1)
    one.start()
    assert (run.folder / CHECKPOINT).read_bytes() == before
    with pytest.raises(ValueError, match="was made by another recipe; restore that one, or begin again with --fresh"):
        replace(one, recipe=replace(SHORT, muon_rate=0.5)).start()


def test_a_run_without_a_checkpoint_has_nothing_to_finish(tmp_path):
    with pytest.raises(ValueError, match="expected a run that saved one"):
        Run(SHORT, tmp_path, "a test", processes=1).start(training=False)


def test_records_after_the_checkpoint_are_dropped_when_a_run_goes_on(tmp_path):
    path = tmp_path / LOG
    first = log.Log(path)
    for step in (2, 4, 6):
        first("train", step, loss=1.0)
    path.write_text(path.read_text() + '{"kind": "tr')  # cut off while it was written
    log.Log(path, step=4)
    assert [record["step"] for record in log.read(path)] == [2, 4]


# -- what is shipped ------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_what_the_recipe_describes():
    shipped = AutoModelForCausalLM.from_pretrained(MODEL).config.to_diff_dict()
    described = configuration().to_diff_dict()
    for name, value in described.items():
        assert shipped[name] == value, name


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_model_solves_its_tasks(task):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert right(model, task, 512, range(16)) >= 14
