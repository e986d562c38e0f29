"""The demo's sweep over policies and keeps, its intervals and its pictures."""

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kvfx
from kvfx.cli import main
from kvfx.demo import curve, heatmap, notes, pictures, run, sweep
from kvfx.demo.family import OTHERS, family_of
from kvfx.demo.heatmap import CELLS, Strip, codes, kept_tokens
from kvfx.demo.interval import wilson
from kvfx.errors import InputError, PolicyError
from kvfx.policy import Policy
from kvfx.presets import PRESETS

HEADS = "knorm | budget=heads(0.5)"  # heads of a layer hold unequally many slots
PNG = b"\x89PNG\r\n\x1a\n"


def command(*args):
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def swept():
    return sweep.sweep("eager", 6, documents=2, tokens=192, names=["knorm", HEADS, "random:0.7"], keeps=[1.0, 0.25])


# -- intervals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "cases", "low", "high"),
    # From statsmodels.stats.proportion.proportion_confint(method="wilson").
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (8, 10, 0.490162, 0.943318), (50, 100, 0.403832, 0.596168)],
)
def test_an_interval_is_wilsons(hits, cases, low, high):
    assert wilson(hits, cases) == pytest.approx((low, high), abs=1e-6)


def test_a_wider_level_is_a_wider_interval_and_nonsense_is_refused():
    assert wilson(8, 10, 0.99)[0] < wilson(8, 10)[0] < wilson(8, 10)[1] < wilson(8, 10, 0.99)[1]
    for hits, cases in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected 0 <= hits <= cases"):
            wilson(hits, cases)


# -- the sweep -----------------------------------------------------------------------------------------------------------------


def test_every_preset_with_a_keep_is_swept_and_has_a_family():
    assert sweep.policies() == [name for name in PRESETS if name != "none"]
    assert [name for name in sweep.policies() if family_of(Policy.parse(name)) == OTHERS] == []


def test_keeping_everything_answers_what_the_full_cache_answers(swept):
    points = {(point.policy, point.keep): point for point in swept.points}
    assert set(points) == {(name, keep) for name in ("knorm", HEADS, "random:0.7") for keep in (1.0, 0.25)}
    assert swept.full.right > 6
    assert {points[name, 1.0].right for name, _ in points} == {swept.full.right}
    assert points["knorm", 0.25].nbytes == pytest.approx(0.25 * swept.full.nbytes, rel=0.05)
    assert all(point.low <= point.right / 12 <= point.high for point in swept.points)


def test_a_ragged_cache_is_weighed_before_its_copies_grow_the_pool(swept):
    ragged = next(point for point in swept.points if (point.policy, point.keep) == (HEADS, 0.25))
    assert ragged.nbytes < 0.5 * swept.full.nbytes  # blocks are not full


def test_the_keep_of_a_named_policy_is_replaced_and_none_has_none(swept):
    assert json.loads(json.dumps(swept.as_dict()))["points"][-1]["share"] == pytest.approx(0.25, rel=0.05)
    with pytest.raises(PolicyError, match="none keeps everything"):
        sweep.sweep("eager", 1, names=["none"])


# -- which tokens were kept ----------------------------------------------------------------------------------------------------


def test_kept_tokens_are_the_positions_of_a_cache_whose_heads_differ():
    positions = torch.tensor([[[0, 2, 5], [1, 2, 3]]], dtype=torch.int32)
    states = torch.zeros(1, 2, 3, 4)
    cache = kvfx.Cache.from_layers([(states, states, positions), (states, states, positions.flip(1))], 6)
    first, second = [1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]
    assert [layer.astype(int).tolist() for layer in kept_tokens(cache)] == [[first, second], [second, first]]


def test_kept_tokens_of_a_ragged_cache_count_what_each_head_holds(swept):
    assert [layer.shape for layer in swept.kept[HEADS]] == [(2, 192)] * 4
    assert [layer.sum() for layer in swept.kept[HEADS]] == [2 * 48] * 4
    assert any(layer[0].sum() != layer[1].sum() for layer in swept.kept[HEADS])


def test_a_cell_says_whether_it_was_kept_and_whether_it_was_needed():
    kept = np.array([[True, False, True, False]])
    found = [list(CELLS)[code] for code in codes(kept, [2, 3])[0]]
    assert found == ["kept", "evicted", "kept, needed for the answer", "evicted, needed for the answer"]


def test_the_question_shown_is_one_that_divides_the_policies():
    full, others = [True, False, True, True], [[True, True, True, False], [True, False, False, False]]
    assert pictures.most_telling(full, others) == 2


def test_the_statements_asked_about_are_enlarged_with_their_words():
    document = notes.write(192, 6)
    question = document.questions[0]
    strips = [Strip("one", [np.zeros((2, 192), dtype=bool)] * 2), Strip("other", [np.ones((2, 192), dtype=bool)] * 2)]
    picture = heatmap.draw("title", strips, document.text.split(), document.places(question))
    overview, enlarged = picture.axes[-2:]
    assert overview.images[0].get_array().shape == (4, 192)
    shown = [label.get_text() for label in enlarged.get_xticklabels()]
    assert " ".join(question.statements[0].split()) in " ".join(shown)
    needed = sum(len(place) for place in document.places(question))
    assert (overview.images[0].get_array() == list(CELLS).index("kept, needed for the answer")).sum() == 4 * needed


def test_a_curve_has_a_line_for_every_policy_with_its_interval(swept):
    picture = curve.draw(swept)
    labels = [text.get_text() for panel in picture.axes for legend in [panel.get_legend()] if legend for text in legend.get_texts()]
    assert sorted(set(labels)) == ["full cache", "knorm", HEADS, "random:0.7"]


def test_the_sweep_is_drawn_as_png_and_svg_the_same_each_time(swept, tmp_path):
    first, second = pictures.draw(swept, tmp_path / "a"), pictures.draw(swept, tmp_path / "b")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["accuracy.png", "accuracy.svg", "kept.png", "kept.svg"]
    assert first[0].read_bytes().startswith(PNG)
    assert b"<svg" in first[1].read_bytes()[:1000]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


@pytest.mark.slow
def test_the_default_demo_draws_what_each_policy_kept(tmp_path):
    demo = run.run("eager", 4, tokens=128, policies=("knorm:0.5",))
    assert [file.name for file in pictures.draw(demo, tmp_path)] == ["kept.png", "kept.svg"]
    assert [[layer.sum(1).tolist() for layer in kept] for kept in demo.kept] == [[[128] * 2] * 4, [[64] * 2] * 4]


# -- the command line ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_a_policy_is_measured_written_and_drawn(tmp_path):
    files = ("--json", tmp_path / "out.json", "--out", tmp_path / "pictures")
    result = command("demo", "--all", "--policy", "knorm", "--questions", 4, *files)
    assert result.exit_code == 0, result.output
    assert "1 policies x 5 keeps x 16 questions on 4 documents of 1024 tokens, by eager, about 1 min" in result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert [point["keep"] for point in data["points"]] == [1.0, 0.5, 0.25, 0.1, 0.05]
    assert (tmp_path / "pictures" / "accuracy.svg").exists()
    assert (tmp_path / "pictures" / "kept.png").exists()


@pytest.mark.slow
def test_a_checkpoints_kept_tokens_are_drawn(tmp_path):
    document = notes.write(128, 4, kinds=("ask",))
    (tmp_path / "context.txt").write_text(document.text, encoding="utf-8")
    given = ("--model", notes.MODEL, "--context", tmp_path / "context.txt", "--question", document.questions[0].text)
    result = command("demo", *given, "--backend", "eager", "--policy", "knorm:0.5", "--new-tokens", 2, "--out", tmp_path / "drawn")
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["kept.png", "kept.svg"]


def test_without_matplotlib_the_demo_says_so_before_it_measures(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "InputError: pictures are drawn by matplotlib, which is not installed" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="pip install"):
        heatmap.draw("", [Strip("", [np.zeros((1, 1), dtype=bool)])], ())


def test_all_is_refused_for_a_checkpoint_of_the_users(tmp_path):
    (tmp_path / "context.txt").write_text("a", encoding="utf-8")
    given = ("--model", notes.MODEL, "--context", tmp_path / "context.txt", "--question", "b", "--out", tmp_path)
    result = command("demo", *given, "--all")
    assert result.exit_code == 1
    assert "--all is for the packaged model" in " ".join(result.output.split())
