"""A drafter checkpoint is whole, or it is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import Manifest
from msgspec.structs import replace

CONFIG = DrafterConfig(
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=16,
    draft_vocab_size=10,
    max_position_embeddings=32,
)
MANIFEST = Manifest(
    tensors={}, target="tiny", target_revision="r1", tokenizer_hash="tok", parent="3", offsets={"0": 7}, steps=2
)


def tensors(config: DrafterConfig = CONFIG) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    skipped = config.vocab_size - config.draft_vocab_size
    arrays = {n: rng.standard_normal(s).astype("<f4") for n, s in checkpoint.tensor_shapes(config).items()}
    arrays["d2t"] = np.full(config.draft_vocab_size, skipped, "<i8")
    arrays["t2d"] = np.arange(config.vocab_size) >= skipped
    return arrays


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.write(tmp_path / "draft", CONFIG, tensors(), MANIFEST)
    return tmp_path / "draft"


def test_what_is_written_verifies_and_loads(folder: Path) -> None:
    config, manifest = checkpoint.verify(folder, target="tiny", tokenizer_hash="tok", like=CONFIG)
    assert config == CONFIG
    assert manifest == replace(MANIFEST, tensors=checkpoint.hash_tensors(tensors()))
    loaded = checkpoint.load(folder)
    assert loaded.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert loaded[name].dtype == expected.dtype
        np.testing.assert_array_equal(loaded[name], expected)
        assert loaded[name].flags.writeable


def test_the_safetensors_library_reads_the_same(folder: Path) -> None:
    from safetensors.numpy import load_file

    ours = checkpoint.load(folder)
    for name, theirs in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(ours[name], theirs)


def test_the_checksum_follows_the_weights_alone() -> None:
    first = checkpoint.checksum(checkpoint.hash_tensors(tensors()))
    assert first == checkpoint.checksum(dict(reversed(checkpoint.hash_tensors(tensors()).items())))
    changed = tensors()
    changed["norm.weight"][3] += 1
    assert first != checkpoint.checksum(checkpoint.hash_tensors(changed))


@pytest.mark.parametrize(("dtype", "stored"), [("<f2", "F16"), ("bf16", "BF16")])
def test_half_precision_loads_as_float32(folder: Path, dtype: str, stored: str) -> None:
    values = np.array([1.0, -2.5, 0.0, 3.0, 0.5, -0.25, 8.0, 96.0], "<f4")  # exact in either type
    data = (values.view("<u4") >> 16).astype("<u2") if dtype == "bf16" else values.astype(dtype)
    rewrite(folder, "norm.weight", data.tobytes(), dtype=stored)
    checkpoint.verify(folder)
    loaded = checkpoint.load(folder)["norm.weight"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, values)


def entries(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    read = checkpoint.read_tensors(folder / "model.safetensors")
    return {name: (dtype, shape, bytes(data)) for name, (dtype, shape, data) in read.items()}


def store(folder: Path, changed: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file and a manifest that agree with each other, whatever the entries say."""
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, data) in changed.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    edit(
        folder / "manifest.json",
        tensors=checkpoint.hash_tensors({n: np.frombuffer(e[2], "u1") for n, e in changed.items()}),
    )


def rewrite(
    folder: Path, name: str, data: bytes, dtype: str | None = None, shape: tuple[int, ...] | None = None
) -> None:
    old = entries(folder)
    known = old.get(name, ("F32", (len(data) // 4,), b""))
    store(folder, old | {name: (dtype or known[0], shape or known[1], data)})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(folder: Path, name: str, value: float) -> None:
    array = tensors()[name]
    array.flat[1] = value
    rewrite(folder, name, array.tobytes())


def cut(folder: Path, name: str, keep: int) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])


def lose(folder: Path, name: str) -> None:
    store(folder, {n: e for n, e in entries(folder).items() if n != name})


def flip_one_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1  # the lowest mantissa bit or byte of the last tensor: finite, plausible, wrong
    path.write_bytes(blob)


def misalign_vocabulary(folder: Path) -> None:
    rewrite(folder, "t2d", (~tensors()["t2d"]).tobytes())


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "torn config": (lambda f: cut(f, "config.json", 40), r"config\.json"),
    "torn manifest": (lambda f: cut(f, "manifest.json", 40), r"manifest\.json"),
    "empty weights": (lambda f: cut(f, "model.safetensors", 0), r"model\.safetensors"),
    "torn header": (lambda f: cut(f, "model.safetensors", 200), r"model\.safetensors"),
    "torn weights": (lambda f: cut(f, "model.safetensors", 2000), r"model\.safetensors: .* ends past the file"),
    "not weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), r"model\.safetensors"),
    "a list for a header": (
        lambda f: (f / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
        r"model\.safetensors",
    ),
    "missing tensor": (
        lambda f: lose(f, "midlayer.mlp.up_proj.weight"),
        r"tensor midlayer\.mlp\.up_proj\.weight: missing",
    ),
    "unknown tensor": (lambda f: rewrite(f, "extra.bias", b"\0" * 8), r"tensor extra\.bias: not part"),
    "wrong shape": (
        lambda f: rewrite(f, "norm.weight", b"\0" * 16, shape=(4,)),
        r"tensor norm\.weight: shape \(4,\), expected \(8,\)",
    ),
    "shape and bytes disagree": (lambda f: rewrite(f, "norm.weight", b"\0" * 16), r"norm\.weight has 16 bytes"),
    "double precision": (
        lambda f: rewrite(f, "norm.weight", b"\0" * 64, dtype="F64"),
        r"tensor norm\.weight: type F64",
    ),
    "d2t of floats": (lambda f: rewrite(f, "d2t", b"\0" * 40, dtype="F32"), "tensor d2t: type F32, expected I64"),
    "NaN": (lambda f: poison(f, "lm_head.weight", np.nan), r"tensor lm_head\.weight: NaN or infinity"),
    "infinity": (lambda f: poison(f, "fc.weight", -np.inf), r"tensor fc\.weight: NaN or infinity"),
    "NaN in half precision": (
        lambda f: rewrite(f, "norm.weight", b"\x01\x7c" + b"\0" * 14, dtype="F16"),
        r"tensor norm\.weight: NaN or infinity",
    ),
    "one bit of another file": (flip_one_bit, r"tensor .*: sha256 differs from manifest\.json"),
    "hash missing": (lambda f: edit(f / "manifest.json", tensors={}), r"tensor .*: sha256 differs"),
    "hash of nothing": (
        lambda f: edit(f / "manifest.json", tensors={**checkpoint.hash_tensors(tensors()), "ghost": "00"}),
        r"manifest\.json: names tensor ghost",
    ),
    "d2t beyond the vocabulary": (lambda f: poison(f, "d2t", 15), "tensor d2t: maps to a token outside"),
    "d2t below zero": (lambda f: poison(f, "d2t", -2), "tensor d2t: maps to a token outside"),
    "d2t twice the same": (lambda f: poison(f, "d2t", 7), "tensor t2d: does not mark"),
    "t2d of another drafter": (misalign_vocabulary, "tensor t2d: does not mark"),
    "other target": (lambda f: edit(f / "manifest.json", target="big"), "target 'big', this engine serves 'tiny'"),
    "other tokenizer": (lambda f: edit(f / "manifest.json", tokenizer_hash="x"), "tokenizer_hash differs"),
    "other architecture": (lambda f: edit(f / "config.json", architectures=["Medusa"]), "architectures is .*Medusa"),
    "a config of text": (lambda f: edit(f / "config.json", hidden_size="many"), r"config\.json: .*hidden_size"),
    "another size": (
        lambda f: edit(f / "config.json", intermediate_size=16),
        "shapes differ from the drafter in service",
    ),
}


@pytest.mark.parametrize(("damage", "named"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    checkpoint.verify(folder, target="tiny", tokenizer_hash="tok", like=CONFIG)
    damage(folder)
    with pytest.raises(DrafterRejected, match=named):
        checkpoint.verify(folder, target="tiny", tokenizer_hash="tok", like=CONFIG)


def test_a_folder_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrafterRejected, match=r"config\.json"):
        checkpoint.verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "array", "named"),
    [
        ("norm.weight", np.zeros(9, "<f4"), r"tensor norm\.weight: shape \(9,\), expected \(8,\)"),
        ("norm.weight", np.zeros(8, "<f8"), r"tensor norm\.weight: type float64, expected float32"),
        ("extra", np.zeros(8, "<f4"), r"tensor extra: shape \(8,\), expected None"),
    ],
)
def test_wrong_tensors_are_not_written(tmp_path: Path, name: str, array: np.ndarray, named: str) -> None:
    with pytest.raises(DrafterRejected, match=named):
        checkpoint.write(tmp_path / "draft", CONFIG, tensors() | {name: array}, MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        checkpoint.write(folder, CONFIG, tensors(), MANIFEST)
    assert (folder / "model.safetensors").read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_killed_writer_leaves_only_whole_folders(tmp_path: Path) -> None:
    """SIGKILL at any moment: every folder with a final name verifies."""
    code = (
        "import sys, itertools, pathlib, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('t', {__file__!r})\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "print('ready', flush=True)\n"
        "for n in itertools.count():\n"
        "    t.checkpoint.write(pathlib.Path(sys.argv[1]) / f'v{n}', t.CONFIG, t.tensors(), t.MANIFEST)\n"
    )
    for delay in (0.03, 0.07):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / str(delay))], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    whole = sorted(tmp_path.glob("*/v*"))
    assert whole
    for folder in whole:
        checkpoint.verify(folder)
