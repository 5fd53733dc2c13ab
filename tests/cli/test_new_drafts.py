"""The first drafter: made for a target, or taken over from one that somebody published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.cli.wiring import day_0
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Engine, Settings
from livedraft.serving.local import drafter as served
from livedraft.serving.local.place import find
from livedraft.serving.local.text import Text
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import read_target
from livedraft.trainer.vocabulary import most_frequent
from safetensors.numpy import load_file, save_file

from ..serving.local.models import make_target
from .conftest import Site

BUNDLED = find("bundled")
TEXT = "In the beginning God created the heaven and the earth.\ndef main() -> None:\n    return None\n" * 50


def written(site: Site, *arguments: str) -> Path:
    result = site.run("drafts", *arguments, "--out", str(site.folder / "out"))
    assert result.exit_code == 0, result.output
    return site.folder / "out"


# A fresh one.


def test_a_fresh_drafter_is_what_engines_and_trainer_load(site: Site) -> None:
    folder = written(site, "init")
    config, manifest = checkpoint.verify(folder, target="livedraft-tiny", tokenizer_hash=Text(BUNDLED).hash)
    target = read_target(BUNDLED)
    assert (config.vocab_size, config.draft_vocab_size) == (4096, 4096)
    assert served.load(folder, "1", target_revision=manifest.target_revision).target_ids is None
    drafter = Drafter.from_checkpoint(folder, target.embedding)
    assert drafter.lm_head.weight.equal(target.head)
    assert drafter.norm.weight.equal(target.norm)


def test_its_config_says_what_sglang_and_vllm_ask_for(site: Site) -> None:
    config = json.loads((written(site, "init", "--draft-vocab", "512") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["num_hidden_layers"], config["vocab_size"], config["draft_vocab_size"]) == (1, 4096, 512)
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    # By default both read the same layers; written down, one of them would read those beside.
    assert not any("layer_ids" in key for key in (*config, *config.get("eagle_config", {})))


def test_the_vocabulary_is_the_texts_most_frequent_tokens_and_the_end(site: Site) -> None:
    (site.folder / "text.txt").write_text(TEXT)
    result = site.run(
        *("drafts", "init", "--draft-vocab", "30", "--text", str(site.folder / "text.txt")),
        *("--out", str(site.folder / "out")),
    )
    assert result.exit_code == 0, result.output
    kept = Drafter.from_checkpoint(site.folder / "out", read_target(BUNDLED).embedding).draft_ids.tolist()
    backend = Text(BUNDLED).tokenizer.backend_tokenizer
    ids = backend.encode(TEXT, add_special_tokens=False).ids
    counts = np.bincount(ids, minlength=4096)
    assert kept == sorted(kept)
    assert len(kept) == 30
    assert 2 in kept  # ends an answer, and is not in the text
    assert sorted(counts[kept])[1:] == sorted(np.sort(counts)[::-1][:29])
    assert f"{counts[kept].sum() / len(ids):.1%} of the text's" in result.stdout
    weights = load_file(site.folder / "out" / "model.safetensors")
    np.testing.assert_array_equal(weights["lm_head.weight"], read_target(BUNDLED).head.numpy()[kept])


def test_without_a_place_it_lies_where_the_others_look(site: Site) -> None:
    assert site.run("drafts", "init", "--draft-vocab", "64").exit_code == 0
    assert checkpoint.verify(day_0(site.settings))[0].draft_vocab_size == 64


def test_one_that_is_there_may_stay_if_it_fits(site: Site) -> None:
    folder = written(site, "init", "--draft-vocab", "64", "--if-missing")
    before = (folder / "manifest.json").read_bytes()
    assert "there already" in site.run("drafts", "init", "--if-missing", "--out", str(folder)).stdout
    assert (folder / "manifest.json").read_bytes() == before
    other = make_target(site.folder / "other", "llama")
    result = site.run("drafts", "init", "--if-missing", "--out", str(folder), "--target", str(other))
    assert result.exit_code == 1
    assert "of the target" in result.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_another_target(site: Site, family: str) -> None:
    target = make_target(site.folder / family, family, layers=8)
    folder = written(site, "init", "--target", str(target))
    _, manifest = checkpoint.verify(folder, target=str(target))
    served.load(folder, "1", target_revision=manifest.target_revision)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "no/such/folder"], "neither a folder nor a Hugging Face id"),
        (["--target", "empty"], "config.json"),
        (["--target", "pickled"], "holds no .safetensors file"),
        (["--target", "shallow"], "6 layers; SGLang reads three of at least 7"),
        (["--target", "gpt2"], "config.json has no hidden_size; model_type gpt2 is no Llama or Qwen"),
        (["--text", "text.txt"], "--draft-vocab"),
        (["--text", "binary", "--draft-vocab", "8"], "binary"),
        (["--out", "empty"], "exists"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    site: Site, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(site.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (site.folder / "empty").mkdir()
    (site.folder / "text.txt").write_text("text")
    (site.folder / "binary").write_bytes(b"\xff\xfe")
    shutil.copytree(BUNDLED, site.folder / "pickled", ignore=lambda *_: ["model.safetensors"])
    for name in ("gpt2", "shallow"):
        shutil.copytree(BUNDLED, site.folder / name)
    shallow = json.loads((BUNDLED / "config.json").read_text()) | {"num_hidden_layers": 6}
    (site.folder / "shallow" / "config.json").write_text(json.dumps(shallow))
    (site.folder / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_embd": 192}')
    result = site.run("drafts", "init", *arguments)
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@given(st.lists(st.integers(0, 9), min_size=5, max_size=40), st.data())
def test_the_most_frequent_are_chosen(counts: list[int], data: st.DataObject) -> None:
    always = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=3))
    size = data.draw(st.integers(len(always), len(counts)))
    kept = most_frequent(np.array(counts), size, always).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == size
    assert always <= set(kept)
    chosen = [counts[token] for token in kept if token not in always]
    assert all(counts[token] <= min(chosen, default=9) for token in range(len(counts)) if token not in kept)


# A published one.

Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def publish(site: Site, change: Change = lambda tensors, config: None, *, name: str = "published") -> Path:
    """A folder as others publish them: no manifest, no t2d, the target's embedding in it, other names."""
    fresh = site.folder / f"{name}-fresh"
    assert site.run("drafts", "init", "--draft-vocab", "256", "--out", str(fresh)).exit_code == 0
    tensors = {
        key.replace("midlayer.", "layers.0."): value for key, value in load_file(fresh / "model.safetensors").items()
    }
    del tensors["t2d"]
    tensors["embed_tokens.weight"] = read_target(BUNDLED).embedding.numpy()
    config = json.loads((fresh / "config.json").read_text())
    for field in ("rope_parameters", "attention_bias", "torch_dtype"):
        del config[field]
    config["dtype"] = "float32"
    change(tensors, config)
    folder = site.folder / name
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_published_drafter_becomes_ours(site: Site) -> None:
    folder = written(site, "import", str(publish(site)))
    config, manifest = checkpoint.verify(folder, target="livedraft-tiny", tokenizer_hash=Text(BUNDLED).hash)
    fresh = load_file(site.folder / "published-fresh" / "model.safetensors")
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == fresh.keys()
    assert all(np.array_equal(ours[name], fresh[name]) for name in ours)
    assert config.draft_vocab_size == 256
    assert manifest.created_at > 0
    served.load(folder, "1")


def test_shards_and_short_types_are_read(site: Site) -> None:
    def halve(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.int32 if name == "d2t" else np.float16)

    whole = publish(site, halve)
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, whole / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = load_file(written(site, "import", str(whole)) / "model.safetensors")
    np.testing.assert_array_equal(ours["fc.weight"], tensors["fc.weight"].astype(np.float32))
    assert ours["d2t"].dtype == np.int64


def test_a_head_that_is_the_targets_is_written_down(site: Site) -> None:
    def headless(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        del tensors["lm_head.weight"], tensors["d2t"]
        config["draft_vocab_size"] = None

    ours = load_file(written(site, "import", str(publish(site, headless))) / "model.safetensors")
    np.testing.assert_array_equal(ours["lm_head.weight"], read_target(BUNDLED).head.numpy())
    assert not ours["d2t"].any()


def _set(name: str, value: object) -> Change:
    return lambda tensors, config: config.update({name: value})


def _tensor(name: str, make: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        made = make(tensors.pop(name, np.zeros(3, np.float32)))
        if made is not None:
            tensors[name] = made

    return change


def _reading(layers: list[int], *, inside: bool) -> Change:
    ids = {"eagle_aux_hidden_state_layer_ids": layers}
    return lambda tensors, config: config.update({"eagle_config": ids} if inside else ids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("architectures", ["LlamaForCausalLMEagle"]), "expected LlamaForCausalLMEagle3"),
        (_set("vocab_size", 5000), "vocab_size is 5000, expected 4096, the target's"),
        (_set("hidden_size", 256), "hidden_size is 256"),
        (_set("target_hidden_size", 256), "target_hidden_size is 256"),
        (_set("num_hidden_layers", 2), "num_hidden_layers is 2"),
        (_set("norm_output", True), "norm_output"),
        (_set("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), "llama3"),
        (_set("intermediate_size", 7), "mlp.down_proj.weight: shape"),
        (_set("num_attention_heads", "three"), "num_attention_heads|invalid literal"),
        (_set("draft_vocab_size", 300), "tensor d2t: shape (256,), expected (300,)"),
        (_reading([2, 8, 13], inside=True), "expected [1, 7, 12]"),
        (_reading([1, 7, 12], inside=False), "eagle_aux_hidden_state_layer_ids"),
        (_tensor("fc.weight", lambda found: None), "tensor fc.weight: missing"),
        (_tensor("fc.bias", lambda found: found), "tensor fc.bias: not part"),
        (_tensor("fc.weight", lambda found: found * np.float32("nan")), "tensor fc.weight: NaN"),
        (_tensor("fc.weight", lambda found: found[:, :-1]), "tensor fc.weight: shape"),
        (_tensor("embed_tokens.weight", lambda found: found[:, :-1]), "embed_tokens.weight: shape"),
        (_tensor("d2t", lambda found: None), "tensor d2t: missing"),
        (_tensor("d2t", lambda found: found + 5000), "outside the target's vocabulary"),
        (_tensor("d2t", lambda found: -np.arange(len(found))), "two rows to one token"),
        (_tensor("t2d", lambda found: np.ones(4096, bool)), "tensor t2d"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(site: Site, change: Change, says: str) -> None:
    result = site.run("drafts", "import", str(publish(site, change)), "--out", str(site.folder / "out"))
    assert result.exit_code == 1
    assert any(part in result.stderr for part in says.split("|")), result.stderr
    assert not (site.folder / "out").exists()
    assert not list(site.folder.glob(".out*"))


@pytest.mark.parametrize("inside", [True, False])
def test_default_layers_may_be_written_down(site: Site, inside: bool) -> None:
    written(site, "import", str(publish(site, _reading([1, 7, 12] if inside else [2, 8, 13], inside=inside))))


def test_a_pickle_is_refused(site: Site) -> None:
    folder = publish(site)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    result = site.run("drafts", "import", str(folder), "--out", str(site.folder / "out"))
    assert result.exit_code == 1
    assert "pickle" in result.stderr


def test_published_it_is_live_where_nothing_is_and_else_the_candidate(site: Site) -> None:
    first = publish(site, name="first")
    other = publish(site, _tensor("fc.weight", lambda found: found * 2), name="other")

    def register(folder: Path, out: str) -> str:
        return site.run("drafts", "import", str(folder), "--publish", "--out", str(site.folder / out)).stdout

    assert "version 1, which is live" in register(first, "a")
    assert "version 2, which is candidate" in register(other, "b")
    assert "version 1, which is live already" in register(first, "c")
    found = {alias: site.registry.resolve(alias) for alias in ("live", "candidate")}
    assert {alias: version and version.version for alias, version in found.items()} == {"live": "1", "candidate": "2"}


# What the processes begin with.


def test_the_processes_begin_with_the_folder_that_is_named(site: Site) -> None:
    folder = written(site, "init", "--draft-vocab", "64")
    named = Settings(engine=Engine(drafter=str(folder)))
    assert day_0(named) == folder
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"engine\.drafter"):
        day_0(named)
