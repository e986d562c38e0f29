"""The demo: its documents, its packaged model, what is measured, and the cut between a user's context and question."""

import io
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from kvfx.demo import checkpoint, notes, run
from kvfx.demo.measure import with_full_cache
from kvfx.errors import InputError, PolicyError


@pytest.fixture(scope="module")
def packaged():
    return run.load()


@pytest.fixture(scope="module")
def demo():
    return run.run("eager", 16, tokens=384, policies=("compactor:0.5", "compactor:0.25", "random:0.5"))


@pytest.mark.parametrize(("length", "questions"), [(96, 3), (384, 16), (1024, 40)])
def test_a_document_is_as_long_as_asked_and_one_word_is_one_token(packaged, length, questions):
    document = notes.write(length, questions, seed=3)
    ids = packaged[1](document.text, return_tensors="pt").input_ids
    assert ids.shape == (1, length)
    assert " ".join(packaged[1].convert_ids_to_tokens(ids[0].tolist())) == document.text
    assert len(document.questions) == questions
    assert {len(question.text.split()) for question in document.questions} == {2}


def test_answers_stand_in_the_document():
    document = notes.write(1024, 40, seed=5)
    assert {question.kind for question in document.questions} == set(notes.KINDS)
    for question in document.questions:
        name = question.text.split()[1]
        match question.kind:
            case "ask":
                assert f" note {name} {' '.join(question.answer)} " in document.text
            case "all":
                assert document.text.count(f" note {name} ") == 3
                assert all(f" note {name} {value} ; " in document.text for value in question.answer[:-1])
            case "trace":
                chain = [name, *question.answer[:-1]]
                links = [document.text.index(f" set {x} {y} ; ") for x, y in pairwise(chain)]
                assert links == sorted(links, reverse=True)


def test_a_question_knows_where_its_statements_stand():
    document = notes.write(512, 20, seed=5)
    words = document.text.split()
    for question in document.questions:
        places = document.places(question)
        assert len(places) == {"ask": 1, "all": 3, "trace": 3}[question.kind]
        assert [" ".join(words[at] for at in place) for place in places] == list(question.statements)
    last = notes.Question("ask", "ask k_a", ("7", ";"), ("note k_a 7 ;",))
    assert notes.Document("<s> zu note k_a 7 ;", (last,)).places(last) == [range(2, 6)]


def test_documents_depend_on_the_seed_alone():
    assert notes.write(256, 8, seed=1) == notes.write(256, 8, seed=1)
    assert notes.write(256, 8, seed=1) != notes.write(256, 8, seed=2)


def test_too_many_questions_are_refused():
    with pytest.raises(InputError, match="1000 questions do not fit into a document of 1024 tokens"):
        notes.write(1024, 1000)
    with pytest.raises(InputError, match="do not fit"):
        notes.write(16384, 200)  # more names than there are


@pytest.mark.parametrize(
    ("kind", "words", "right"),
    [
        ("ask", ["342", "718", ";", "note"], True),
        ("ask", ["718", "342", ";"], False),
        ("ask", ["342", "718"], False),
        ("all", ["718", "342", ";"], True),
        ("all", ["718", "718", ";"], False),
        ("all", ["718", ";", "342"], False),
    ],
)
def test_an_answer_must_be_exact_up_to_the_order_of_a_list(kind, words, right):
    assert notes.Question(kind, f"{kind} k_nera", ("342", "718", ";")).is_answered_by(words) is right


def test_the_full_cache_answers_nearly_everything(demo):
    assert demo.rows[0].policy == "none"
    assert sum(demo.right[0]) >= 15


def test_compactor_keeps_what_random_drops(demo):
    right = {row.policy: sum(answers) for row, answers in zip(demo.rows, demo.right, strict=True)}
    assert right["compactor:0.5"] >= 12 > right["random:0.5"]


def test_bytes_follow_the_keep(demo):
    share = {row.policy: row.nbytes / demo.rows[0].nbytes for row in demo.rows}
    assert share["compactor:0.5"] == pytest.approx(0.5, abs=0.02)
    assert share["compactor:0.25"] == pytest.approx(0.25, abs=0.02)
    assert [row.slots for row in demo.rows] == [(384,) * 4, (192,) * 4, (96,) * 4, (192,) * 4]


def test_the_table_has_a_row_for_each_policy_and_says_what_it_does_not_show(demo):
    console = Console(width=120, file=io.StringIO())
    console.print(demo)
    text = console.file.getvalue()
    for row, right in zip(demo.rows, demo.right, strict=True):
        assert any(line.startswith(f"│ {row.policy} ") and f" {sum(right)}/16 " in line for line in text.splitlines())
    assert "4 of 4 layers compressed" in text
    assert "0.7 M parameters" in text
    assert "What it does not show" in text


def test_results_are_json(demo):
    data = json.loads(json.dumps(demo.as_dict()))
    assert [row["policy"] for row in data["rows"]] == [row.policy for row in demo.rows]
    assert data["rows"][1]["share"] == demo.rows[1].nbytes / demo.rows[0].nbytes
    assert data["sites"]["policy"].startswith("zscore")


def test_the_full_cache_is_put_in_front_once():
    assert [policy.name for policy in with_full_cache(["knorm", "none", "knorm:0.5"])] == ["none", "knorm:0.5"]
    with pytest.raises(PolicyError):
        with_full_cache(["knrom"])


# -- a user's context and questions ---------------------------------------------------------------------------------


class Pairs:
    """A tokenizer whose tokens are pairs of characters."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(a) * 1000 + ord(b) for a, b in zip(text[::2], text[1::2] + " ", strict=False)]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)


class Chat(Pairs):
    """The same with a chat template."""

    chat_template = "yes"
    template = "<user>{}<model>"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return self.template.format(messages[0]["content"])


class Shouting(Chat):
    """A template that does not leave the context as it is."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return super().apply_chat_template(messages, tokenize, add_generation_prompt).upper()


def joined(prompt, index):
    return torch.cat([prompt.context, prompt.questions[index]], 1)[0].tolist()


def test_plain_prompts_are_cut_behind_the_context():
    prompt = checkpoint.cut(Pairs(), "abcdef", ["why?", " who? "])
    assert prompt.context.shape == (1, 4)
    assert joined(prompt, 1) == Pairs()("abcdef\n\nwho?").input_ids
    assert prompt.remarks == ()


def test_a_token_over_the_end_of_the_context_stays_with_the_question():
    prompt = checkpoint.cut(Pairs(), "abcde", ["why?"])
    assert prompt.context.shape == (1, 3)
    assert joined(prompt, 0) == Pairs()("abcde\n\nwhy?").input_ids
    assert "the last 1 change" in prompt.remarks[0]


def test_a_chat_template_wraps_context_and_question_in_one_message():
    prompt = checkpoint.cut(Chat(), "abcdef", ["why?", "where?"])
    assert prompt.context.shape == (1, 6)
    assert joined(prompt, 1) == Pairs()("<user>abcdef\n\nwhere?<model>", add_special_tokens=False).input_ids
    assert prompt.remarks == ()


def test_a_template_that_changes_the_context_is_left_out():
    prompt = checkpoint.cut(Shouting(), "abcdef", ["why?"])
    assert joined(prompt, 0) == Pairs()("abcdef\n\nwhy?").input_ids
    assert "chat template changes the context" in prompt.remarks[0]


@pytest.mark.parametrize(("context", "questions"), [(" ", ["why?"]), ("abc", []), ("abc", ["why?", " "])])
def test_an_empty_prompt_is_refused(context, questions):
    with pytest.raises(InputError, match="need some text"):
        checkpoint.cut(Pairs(), context, questions)
