"""The command line."""

import json
import shutil

import pytest
import transformers
from typer.testing import CliRunner

import kvfx as kvfx_package
from kvfx.cli import main
from kvfx.demo import notes
from kvfx.presets import PRESETS
from test_explain import no_rule_knows  # noqa: F401 - registered as an attention of transformers


def kvfx(*args):
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(notes.MODEL, tmp_path / "model")


@pytest.fixture
def document(tmp_path):
    text = notes.write(128, 4, kinds=("ask",))
    (tmp_path / "context.txt").write_text(text.text + "\n", encoding="utf-8")
    return text


def test_the_demo_compares_and_writes_json(tmp_path):
    result = kvfx("demo", "--backend", "eager", "--questions", 4, "--policy", "none", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "4/4" in result.output
    assert "LlamaForCausalLM under none" in result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["backend"] == "eager"
    assert [row["policy"] for row in data["rows"]] == ["none"]
    assert data["rows"][0]["right"] == 4


@pytest.mark.slow
def test_a_checkpoint_answers_questions_on_a_file(tmp_path, folder, document):
    asked = document.questions[:2]
    questions = [part for question in asked for part in ("--question", question.text)]
    out = tmp_path / "out.json"
    source = ("--model", folder, "--context", tmp_path / "context.txt")
    result = kvfx("demo", "--backend", "eager", *source, *questions, "--policy", "random:0.1", "--json", out)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data["tokens"] == 128
    assert [row["policy"] for row in data["rows"]] == ["none", "random:0.1"]
    assert data["rows"][1]["slots"] == [12] * 4
    # The answer's last word, `;`, is a special token, which is not shown.
    assert data["rows"][0]["answers"] == [" ".join(question.answer[:-1]) for question in asked]
    assert all(question.text in result.output for question in asked)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "compacter:0.5"], "Did you mean 'compactor'?"),
        (["--questions", "1000"], "1000 questions do not fit"),
        (["--backend", "fast"], "unknown backend 'fast'"),
        (["--question", "why?"], "add --model DIR"),
        (["--model", "."], "--model needs --context FILE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_are_one_message_without_a_traceback(args, message):
    result = kvfx("demo", *args)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_folder_without_a_model_is_a_clean_error(tmp_path, document):
    result = kvfx("demo", "--model", tmp_path, "--context", tmp_path / "context.txt", "--question", "why?")
    assert result.exit_code == 1
    assert "InputError: cannot load a causal decoder" in " ".join(result.output.split())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A folder with a config and nothing else, of a model that would not fit into memory twice."""
    folder = tmp_path_factory.mktemp("config")
    size = {"hidden_size": 4096, "intermediate_size": 65536, "num_attention_heads": 32, "num_key_value_heads": 8}
    transformers.LlamaConfig(**size, num_hidden_layers=2).save_pretrained(folder)
    return folder


def test_a_config_is_enough_to_explain_policies(config, tmp_path):
    policies = ("--policy", "knorm:0.5", "--policy", "knorm | budget=uniform(tokens=64)")
    result = kvfx("explain", config, *policies, "--strict", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM under knorm:0.5: 2 of 2 layers compressed" in result.output
    assert "no weights were read" in " ".join(result.output.split())
    data = json.loads((tmp_path / "out.json").read_text())
    assert [[site["budget"] for site in each["sites"]] for each in data] == [["0.5 of S"] * 2, ["64 tokens"] * 2]


def test_what_is_left_alone_is_reported_and_an_exit_code_if_asked_for(config):
    arguments = ("explain", config, "--policy", "knorm:0.5", "--attention", "no_rule_knows", "--json", "-")
    result = kvfx(*arguments)
    assert result.exit_code == 0, result.output
    (data,) = json.loads(result.stdout)
    assert (data["layers"], data["compressed"], len(data["refusals"])) == (2, 0, 2)
    assert "0 of 2 layers compressed" in result.stderr
    assert kvfx(*arguments, "--strict").exit_code == 3


@pytest.mark.parametrize(
    ("made_of", "args", "message"),
    [
        (None, [], "InputError: {} holds no config.json"),
        (None, ["--policy", "compacter:0.5"], "PolicyError: unknown policy 'compacter'. Did you mean 'compactor'?"),
        (transformers.LlamaConfig, ["--attention", "fast"], "InputError: cannot make a causal decoder of the config in {}"),
        (transformers.BartConfig, [], "UnsupportedModel: {} is an encoder-decoder (bart)"),
    ],
    ids=["no config", "policy", "attention", "encoder-decoder"],
)
def test_what_cannot_be_explained_is_a_clean_error(tmp_path, made_of, args, message):
    if made_of is not None:
        made_of().save_pretrained(tmp_path)
    result = kvfx("explain", tmp_path, *args)
    assert result.exit_code == 1
    # A terminal breaks long paths anywhere.
    assert message.format(tmp_path).replace(" ", "") in "".join(result.output.split())
    assert "Traceback" not in result.output


def test_presets_are_listed_and_shown():
    listed = kvfx("policies")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in PRESETS)
    everything = " ".join(listed.output.split())
    for column in ("policy", "reads", "cost per token", "source", "pre_key", "Cholesky", "[size,"):
        assert column in everything
    shown = kvfx("policies", "compactor")
    assert shown.exit_code == 0
    assert "blend" in shown.output
    assert "leverage" in shown.output
    assert kvfx("policies", "none").exit_code == 0
    assert kvfx("policies", "compacter").exit_code == 1


@pytest.mark.slow
@pytest.mark.inductor
def test_a_checkpoint_is_exported_and_the_package_continues_a_text(folder, tmp_path):
    numbers = ("--max-prompt", 32, "--max-new-tokens", 8, "--dtype", "float32")
    result = kvfx("export", folder, tmp_path / "package", "--policy", "knorm:0.5", *numbers)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM under knorm:0.5" in " ".join(result.output.split())
    text = " ".join(notes.write(128, 4, kinds=("ask",)).text.split()[:20])
    result = kvfx("run", tmp_path / "package", "--prompt", text, "--new-tokens", 6)
    assert result.exit_code == 0, result.output
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    compiled = kvfx_package.compile(model.float().eval(), "knorm:0.5", backend="eager")
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = tokenizer.decode(compiled.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    assert result.output.strip() == expected.strip()


def test_what_is_no_package_is_refused_without_a_traceback(tmp_path):
    result = kvfx("run", tmp_path, "--prompt", "a")
    assert result.exit_code == 1
    assert "ArtifactError: cannot read the package" in " ".join(result.output.split())
