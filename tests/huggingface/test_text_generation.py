"""Tests of text in and text out: a Hugging Face folder becomes a package that generates, chats and streams."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import sample_package, tiny_folder
from support.cache_entries import RecordingProgress
from transformers import AutoModelForCausalLM, AutoTokenizer

import ryzen_compile as rc
from ryzen_compile.artifacts.package import layout
from ryzen_compile.cli.main import program, run
from ryzen_compile.data.documents import documents_from_samples
from ryzen_compile.errors import BackendError, ModelError, PackageError, ShapeError, UsageError
from ryzen_compile.report.text import format_package_brief
from ryzen_compile.runtime.load import Engine
from ryzen_compile.runtime.single_generation import GenerationRequest, generate_once
from ryzen_compile.spec.interface import InputSpec
from ryzen_compile.text.sample_texts import TEXTS

PROMPT = "The bridge was closed"
MESSAGES = [{"role": "user", "content": "How do I change it?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.write_decoder(tmp_path_factory.mktemp("hf") / "tiny-llama")


@pytest.fixture(scope="module")
def package(folder: Path) -> Path:
    """The package of the step graphs of the decoder in `folder`."""
    model, steps = folder.parent / "m.onnx", folder.parent / "dec"
    rc.export(f"hf:{folder}", model)
    rc.rewrite_steps(model, steps, passes="kv-static{capacity=128}", steps="1,any")
    return rc.build(steps, gpu="cpu", compare=False, cache=False).path


@pytest.fixture(scope="module")
def engine(package: Path) -> Iterator[Engine]:
    with rc.load(package) as engine:
        yield engine


def reference_ids(folder: Path, ids: Any, count: int) -> list[int]:
    """Return the greedy continuation of `ids` by Transformers, which stops at the model's end-of-sequence token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = torch.tensor(ids)[None]
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False)
    return output[0, inputs.shape[1] :].tolist()  # type: ignore[no-any-return]


def test_package_lists_its_tokenizer_files_with_digests(package: Path) -> None:
    manifest = rc.inspect(package, check_digests=True).manifest
    assert manifest.text_files == ("text/generation_config.json", "text/tokenizer.json", "text/tokenizer_config.json")
    assert set(manifest.text_files) <= {file.path for file in manifest.files}


def test_text_is_continued_as_transformers_continues_it(engine: Engine, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = reference_ids(folder, tokenizer(PROMPT)["input_ids"], 40)
    (sequence,) = engine.generate(PROMPT, max_new_tokens=40)
    assert sequence.tokens.tolist() == expected
    assert sequence.text == tokenizer.decode(expected, skip_special_tokens=True)
    batch = engine.generate([PROMPT, "Yes."], max_new_tokens=40)
    assert [batch[0].tokens.tolist(), len(batch)] == [expected, 2]


def test_ids_are_continued_without_text(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    (from_ids,) = engine.generate(ids, max_new_tokens=8)
    (from_text,) = engine.generate(PROMPT, max_new_tokens=8)
    np.testing.assert_array_equal(from_ids.tokens, from_text.tokens)
    assert from_ids.text is None


def test_an_onnx_file_has_the_tokenizer_that_it_was_exported_with(folder: Path, engine: Engine, tmp_path: Path) -> None:
    rc.export(f"hf:{folder}", tmp_path / "m.onnx")
    rc.rewrite(tmp_path / "m.onnx", tmp_path / "r.onnx", passes="kv-static{capacity=128}")
    with rc.load(tmp_path / "r.onnx") as rewritten:
        assert rewritten.has_tokenizer
        (sequence,), (expected,) = (each.generate(PROMPT, max_new_tokens=8) for each in (rewritten, engine))
        assert (sequence.text, sequence.tokens.tolist()) == (expected.text, expected.tokens.tolist())
        (tmp_path / "r.text" / "tokenizer.json").write_text("{}")
    with rc.load(tmp_path / "r.onnx") as changed, pytest.raises(ModelError, match="is not the tokenizer file that"):
        changed.generate(PROMPT)


def test_the_ids_of_the_generation_config_end_a_text(engine: Engine) -> None:
    assert engine.tokenizer.stop_ids == {2}
    (free,) = engine.generate(PROMPT, max_new_tokens=8, stop=())
    (stopped,) = engine.generate(PROMPT, max_new_tokens=8, stop=[int(free.tokens[2])])
    assert (stopped.finish_reason, len(stopped.tokens)) == ("stop", list(free.tokens).index(free.tokens[2]) + 1)


def test_streamed_pieces_are_the_text(engine: Engine) -> None:
    (sequence,) = engine.generate(PROMPT, max_new_tokens=24)
    with engine.stream_text(PROMPT, max_new_tokens=24) as stream:
        pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == sequence.text
    assert (stream.tokens, stream.finish_reason) == (sequence.tokens.tolist(), sequence.finish_reason)


def test_closing_a_stream_ends_the_generation(engine: Engine) -> None:
    with engine.stream_text(PROMPT, max_new_tokens=24, stop=()) as stream:
        next(stream)
    assert stream.finish_reason is None
    assert 0 < len(stream.tokens) < 24


def test_conversation_is_rendered_as_transformers_renders_it(engine: Engine, folder: Path) -> None:
    ids = engine.tokenizer.encode_chat(MESSAGES)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids.tolist() == expected
    reply = engine.chat(MESSAGES, max_new_tokens=16)
    assert reply.tokens.tolist() == reference_ids(folder, ids, 16)
    assert "".join(engine.stream_text(MESSAGES, max_new_tokens=16)) == reply.text


def test_unknown_option_is_refused_with_the_right_spelling(engine: Engine) -> None:
    with pytest.raises(UsageError, match="there is no generation option `temprature`") as caught:
        engine.generate(PROMPT, temprature=1.0)  # type: ignore[call-arg]
    assert caught.value.hint == "did you mean `temperature`?"


def test_an_empty_prompt_is_refused_if_the_tokenizer_begins_no_text_with_a_token(
    folder: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(package), "", "-n", "1"]) == 0, "the tokenizer of the folder begins it with <bos>"
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    rc.export(f"hf:{other}", tmp_path / "m.onnx")
    rc.rewrite(tmp_path / "m.onnx", tmp_path / "d.onnx", passes="kv-static{capacity=64}")
    plain = rc.build(tmp_path / "d.onnx", gpu="cpu", compare=False, cache=False).path
    capsys.readouterr()
    assert run(["generate", str(plain), ""]) == 2
    assert "error: the prompt is empty, and this tokenizer adds no token that begins a text" in capsys.readouterr().err


def test_session_keeps_its_engine_open(package: Path) -> None:
    session = rc.load(package).session(1)
    gc.collect()
    assert session.step([[1, 5]]).shape == (1, 2, tiny_folder.VOCAB_SIZE)
    session.close()


def test_model_without_chat_template_refuses_conversations(tmp_path: Path) -> None:
    from ryzen_compile.text.tokenizer import TextTokenizer

    tiny_folder.write_tokenizer(tmp_path, chat_template=None)
    tokenizer = TextTokenizer({file.name: file.read_bytes() for file in tmp_path.iterdir()}, source="it")
    with pytest.raises(UsageError, match="it has no chat template: the model continues text"):
        tokenizer.encode_chat(MESSAGES)


def test_chat_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    from ryzen_compile.errors import RyzenError
    from ryzen_compile.text.chat_template import render_chat

    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% if %}", "{{ raise_exception('no roles') }}"):
        with pytest.raises(RyzenError, match="the chat template of it fails"):
            render_chat(template, MESSAGES, special_tokens={}, source="it")


def test_damaged_tokenizer_is_refused(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package, tmp_path / "copy.ryzen")
    file = copy / "text" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"a", b"b"))
    with rc.load(copy) as engine, pytest.raises(PackageError, match="is damaged"):
        engine.generate(PROMPT)


def test_package_without_tokenizer_refuses_text(tmp_path: Path) -> None:
    from support import tiny_decoder

    source = tiny_decoder.write(tmp_path / "tiny.onnx")
    with rc.load(rc.build(source, gpu="cpu", compare=False, cache=False).path) as engine:
        with pytest.raises(UsageError, match="this model has no tokenizer, so it takes ids and not text"):
            engine.generate("text")


def test_command_streams_the_text(package: Path, engine: Engine) -> None:
    (sequence,) = engine.generate(PROMPT, max_new_tokens=12)
    result = CliRunner().invoke(program, ["generate", str(package), PROMPT, "-n", "12"])
    assert (result.exit_code, result.stdout) == (0, f"{sequence.text}\n")
    result = CliRunner().invoke(program, ["generate", str(package), "-", "-n", "12", "--json"], input=PROMPT)
    document = json.loads(result.stdout)
    assert (document["text"], document["tokens"]) == (sequence.text, sequence.tokens.tolist())
    reply = engine.chat([{"role": "system", "content": "Be brief."}, *MESSAGES], max_new_tokens=6)
    arguments = ["generate", str(package), "How do I change it?", "--chat", "--system", "Be brief.", "-n", "6"]
    assert CliRunner().invoke(program, arguments).stdout == f"{reply.text}\n"


def test_a_text_without_end_is_stopped_at_the_limit(folder: Path, package: Path, tmp_path: Path) -> None:
    passes = "kv-static{capacity=64},kv-evict{score=knorm,budget=32,recent-window=8}"
    rc.rewrite_steps(folder.parent / "m.onnx", tmp_path / "dec", passes=passes, steps="1,any")
    endless = rc.build(tmp_path / "dec", gpu="cpu", compare=False, cache=False).path
    arguments = ["generate", str(endless), PROMPT, "-n", "1000000000", "--stop", "0", "--time-limit", "5"]
    result = CliRunner().invoke(program, arguments)
    assert len(result.stdout) > 10
    assert isinstance(result.exception, BackendError)
    assert "exceeded its time limit of 5 s while generating with dec.ryzen" in result.exception.message
    with pytest.raises(KeyboardInterrupt):
        generate_once(
            GenerationRequest(package=str(endless), prompt=PROMPT, chat=False, system=None, options={"max_new_tokens": 10**9}),
            on_text=interrupt,
        )


def interrupt(text: str) -> None:
    raise KeyboardInterrupt


def test_command_reports_the_engine_and_what_it_does_not_meet(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy.ryzen"))
    manifest = rc.inspect(copy).manifest
    for graph in manifest.graphs:
        (variant,) = graph.variants
        unmet = sample_package.with_unmet_criteria(manifest, variant.path)
        (copy / layout.MANIFEST_NAME).write_bytes(layout.encode(unmet))
        result = CliRunner().invoke(program, ["generate", str(copy), PROMPT, "-n", "2"])
        assert result.exit_code == 0, result.output
        assert f"{manifest.graphs[0].variants[0].path} by onnxruntime; " in result.stderr
        assert f"warning: {variant.path}: DOES NOT MEET strict.toml" in result.stderr
        assert result.stderr.count("DOES NOT MEET") == 1
        with rc.load(copy) as engine:
            assert [warning.location for warning in engine.choice.warnings] == [variant.path]
    result = CliRunner().invoke(program, ["generate", str(copy), PROMPT, "-n", "2", "-q"])
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_samples_of_an_export_to_a_folder_are_read(folder: Path, tmp_path: Path) -> None:
    passes = ["--passes", "kv-static{capacity=64},precision{to=fp16}", "--data", str(tmp_path / "missing.npz")]
    assert run(["export", f"hf:{folder}", f"{tmp_path}/m.onnx", *passes]) == 2
    result = CliRunner().invoke(program, ["export", f"hf:{folder}", f"{tmp_path}/dec/", *passes])
    assert "missing.npz" in str(result.exception)
    assert not [*tmp_path.iterdir()]


def test_three_commands_lead_from_a_folder_to_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["export", f"hf:{folder}", "dec/"],
        ["build", "dec/", "--gpu", "cpu", "--no-compare", "--no-cache"],
        ["generate", "dec.ryzen", PROMPT, "-n", "8"],
    ):
        result = CliRunner().invoke(program, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    expected = AutoTokenizer.from_pretrained(folder).decode(reference_ids(folder, ids, 8), skip_special_tokens=True)
    assert result.stdout == f"{expected}\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dec", "dec.ryzen"]
    with rc.load("dec.ryzen") as engine:
        assert engine.interface.capacity == 512  # the positions of the model


def test_encoder_has_no_step_graphs(tmp_path: Path) -> None:
    encoder = tiny_folder.write_encoder(tmp_path / "bert")
    with pytest.raises(ModelError, match="`bert` is not a decoder with KV caches"):
        rc.export_steps(f"hf:{encoder}", tmp_path / "dec")
    assert not (tmp_path / "dec").exists()


def test_a_folder_without_a_tokenizer_is_exported_with_a_note(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    progress = RecordingProgress()
    rc.export_steps(f"hf:{bare}", tmp_path / "dec", progress=progress)
    (comparison,) = (diagnostic for diagnostic in progress.diagnostics if diagnostic.code == "module-compared")
    assert comparison.message.startswith("compared with the module in 7 cases: `")
    assert comparison.message.endswith("the model has no tokenizer (tokenizer.json), so its package takes ids, and no text")


def test_a_comparison_of_a_package_with_its_folder_names_evaluate(package: Path, folder: Path) -> None:
    with pytest.raises(ShapeError, match="takes the inputs") as caught:
        rc.compare(package, f"hf:{folder}")
    command = f"ryzen-compile evaluate {package} --baseline hf:{folder} --data FILE.txt"
    assert command in (caught.value.hint or "")


def test_a_text_encoder_runs_on_texts(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = tiny_folder.write_encoder(tmp_path / "bert")
    rc.export(f"hf:{encoder}", tmp_path / "m.onnx")
    built = rc.build(tmp_path / "m.onnx", gpu="cpu", compare=False, cache=False)
    assert f'next: ryzen-compile run {built.path} "TEXT"; ' in format_package_brief(built)
    texts = ["A short text", "A text of some more words than the first " * 20]
    assert run(["run", str(built.path), *texts, "--save-outputs", str(tmp_path / "o.npz"), "-q"]) == 0
    (longest,) = {profile.max["input_ids"][1] for profile in built.manifest.graphs[0].profiles}
    with rc.load(built) as engine, np.load(tmp_path / "o.npz") as saved:
        inputs = engine.tokenizer.encode_batch(texts, max_tokens=longest)
        expected = engine.run({spec.name: inputs[spec.name] for spec in engine.interface.inputs})
        np.testing.assert_array_equal(saved["last_hidden_state"], expected["last_hidden_state"])
    capsys.readouterr()
    assert run(["run", str(package), "a text"]) == 2
    assert f'ryzen-compile generate {package} "PROMPT"' in capsys.readouterr().err
    assert run(["run", str(built.path), "a text", "--shapes", "input_ids:1x3"]) == 2
    assert "TEXT replaces --data and --shapes" in capsys.readouterr().err


def test_decoder_is_evaluated_on_a_text(package: Path, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text(" ".join(TEXTS), encoding="utf-8")
    record = rc.evaluate(package, baseline=f"hf:{folder}", data=text, documents=1, tokens=96, questions=0, continuations=0)
    compared = [result for result in record.results if result.baseline is not None]
    assert "perplexity" in {result.name for result in compared}
    for result in compared:
        assert result.baseline is not None
        assert result.candidate.value == pytest.approx(result.baseline.value, rel=1e-4), result.name
    with pytest.raises(UsageError, match=r"story\.txt` is a text, and the model has no tokenizer"):
        documents_from_samples(str(text), InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids"))
