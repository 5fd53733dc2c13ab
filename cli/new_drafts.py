"""``livedraft drafts init`` and ``import``: the drafter to begin with, for any target."""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from livedraft.cli.console import ConfigOption, output, progress_output, settings_from
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Manifest
from livedraft.contracts.settings import Engine, Settings
from msgspec.structs import replace
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import numpy as np
    from livedraft.contracts.checkpoint import DrafterConfig

TargetOption = Annotated[
    str, typer.Option("--target", metavar="MODEL", help="Folder or Hugging Face id; default: engine.target.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FOLDER", show_default=False, help="Default: where `livedraft up` looks for its first drafter."
    ),
]


def init(
    config: ConfigOption = None,
    target: TargetOption = "",
    out: OutOption = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            "--draft-vocab", metavar="N", min=1, help="Tokens it can propose; default: engine.draft_vocab (0: all)."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="UTF-8 text like the traffic's, once per file: its most frequent tokens are kept.",
        ),
    ] = None,
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="A drafter for this target that is there already is left as it is.")
    ] = False,
) -> None:
    """Write a fresh EAGLE-3 drafter for a target: it knows nothing but the target's head, and learns the rest.

    Without --draft-vocab it can propose every token of the target. With it, the N most frequent ones of --text and
    the tokens that end an answer; without --text, the vocabulary's first N, which in byte-pair vocabularies are the
    most frequent merges. The choice holds until `livedraft drafts refresh-vocabulary`.

    Start SGLang with --speculative-draft-model-path FOLDER, and livedraft's processes with engine.drafter = FOLDER.

    Example: livedraft drafts init --target Qwen/Qwen3-8B --out drafter --draft-vocab 32000 --text sample.txt
    """
    from livedraft.cli import wiring
    from livedraft.serving.local import place

    settings = settings_from(config, target=target)
    engine = settings.engine if draft_vocab is None else replace(settings.engine, draft_vocab=draft_vocab)
    if text and not engine.draft_vocab:
        raise SettingsError("--text chooses the tokens that --draft-vocab N keeps; give both or neither")
    folder = _place(out, settings)
    if if_missing and folder.exists():
        _require_fit(folder, engine)
        output().print(f"{folder} is there already")
        return
    _require_free(folder)
    kept, coverage = None, ""
    with _bar() as bar:
        bar.add_task("finding the target", total=None)
        folder_of_target = place.find(engine.target)
        _require_three_layers(folder_of_target)
        if text:
            kept, coverage = _vocabulary(folder_of_target, engine.draft_vocab, text, bar)
        bar.add_task("writing the drafter", total=None)
        written, _ = wiring.write_fresh_drafter(engine, folder, settings.trainer.seed, kept)
    output().print(f"wrote {folder}: {_proposing(written)}{coverage}")
    _tell_use(folder)


def import_published(
    drafter: Annotated[str, typer.Argument(metavar="FOLDER|HF_ID", help="A published EAGLE-3 drafter.")],
    config: ConfigOption = None,
    target: TargetOption = "",
    out: OutOption = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Register it: as live where nothing is, else as the candidate.")
    ] = False,
) -> None:
    """Take over a published EAGLE-3 drafter: prove that it fits the target, and write it down as one of ours.

    Names, shapes, types and values are checked, the token map and the layers that it reads; what engines here would
    compute otherwise is refused with the reason. Weights become float32, which is what the trainer goes on from.

    A candidate is judged by the gate before it serves; with the same vocabulary as the live one, that is.

    Example: livedraft drafts import someone/EAGLE3-Qwen3-8B --target Qwen/Qwen3-8B --out drafter --publish
    """
    from livedraft.cli import wiring
    from livedraft.contracts import checkpoint
    from livedraft.serving.local import place
    from livedraft.trainer.adoption import adopt
    from livedraft.trainer.target import read_target

    settings = settings_from(config, target=target)
    folder = _place(out, settings)
    _require_free(folder)
    with _bar() as bar:
        bar.add_task(f"fetching {drafter}", total=None)
        source = place.fetch(drafter, "drafter")
        bar.add_task("reading the target", total=None)
        folder_of_target = place.find(settings.engine.target)
        adopted, tensors = adopt(source, read_target(folder_of_target))
        bar.add_task("writing the drafter", total=None)
        about = replace(wiring.describe(settings.engine, folder_of_target), created_at=time.time())
        half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=_made(folder.parent))) / "drafter"
        try:
            manifest = checkpoint.write(half, adopted, tensors, about)
            checkpoint.verify(half)
            registered = ""
            if publish:  # before it is there: without a registry nothing is left behind, and it can be tried again
                bar.add_task("registering it", total=None)
                registered = _publish(settings, half, manifest)
            half.rename(folder)
        finally:
            shutil.rmtree(half.parent, ignore_errors=True)
    output().print(f"wrote {folder}: {_proposing(adopted)}, checksum {checkpoint.checksum(manifest.tensors)[:12]}")
    if registered:
        output().print(registered, style="green")
    _tell_use(folder)


def _place(out: Path | None, settings: Settings) -> Path:
    from livedraft.cli.wiring import DAY_0

    return (out or Path(settings.trainer.folder) / DAY_0).resolve()


def _require_free(folder: Path) -> None:
    if folder.exists():
        raise SettingsError(f"--out: {folder} exists; drafters are never written over")


def _require_fit(folder: Path, engine: Engine) -> None:
    from livedraft.contracts import checkpoint
    from livedraft.serving.local import place

    checkpoint.verify(folder, target_revision=place.revision(place.find(engine.target)))


def _require_three_layers(folder_of_target: Path) -> None:
    """SGLang takes a layer that is named twice once, and the drafter's first matrix would not fit."""
    from livedraft.trainer.target import feature_layers, read_config

    layers = read_config(folder_of_target)["num_hidden_layers"]
    if len(set(feature_layers(layers))) < 3:
        raise SettingsError(f"target {folder_of_target}: {layers} layers; SGLang reads three of at least 7")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(settings: Settings, folder: Path, manifest: Manifest) -> str:
    """Register it as live where nothing is, else as the candidate; what was done."""
    from livedraft.cli.wiring_registry import open_registry

    registry = open_registry(settings.registry)
    live = registry.resolve("live")
    version = registry.publish(folder, manifest, {}).version
    if live and live.version == version:
        return f"registered as version {version}, which is live already"
    alias = "candidate" if live else "live"
    registry.point(alias, version)
    return f"registered as version {version}, which is {alias}"


def _vocabulary(folder: Path, size: int, files: Sequence[Path], bar: Progress) -> tuple[np.ndarray, str]:
    """The ids to keep, and how much of the text they are."""
    from livedraft.serving.local.text import Text
    from livedraft.trainer.target import end_tokens, read_config
    from livedraft.trainer.vocabulary import count_tokens, most_frequent

    vocab_size = read_config(folder)["vocab_size"]
    task = bar.add_task("counting tokens", total=sum(path.stat().st_size for path in files))
    backend = Text(folder).tokenizer.backend_tokenizer
    counts = count_tokens(
        files,
        lambda piece: list(backend.encode(piece, add_special_tokens=False).ids),
        vocab_size,
        functools.partial(bar.advance, task),
    )
    kept = most_frequent(counts, min(size, vocab_size), end_tokens(folder))
    if not (total := int(counts.sum())):
        raise SettingsError("--text: holds no token")
    return kept, f"; {counts[kept].sum() / total:.1%} of the text's {total:,} tokens are among them"


def _proposing(config: DrafterConfig) -> str:
    if config.draft_vocab_size == config.vocab_size:
        return f"proposes all {config.vocab_size:,} tokens"
    return f"proposes {config.draft_vocab_size:,} of {config.vocab_size:,} tokens"


def _tell_use(folder: Path) -> None:
    output().print(f"livedraft: LIVEDRAFT_ENGINE__DRAFTER={folder}", style="dim")
    output().print(
        f"SGLang:    --speculative-algorithm EAGLE3 --speculative-draft-model-path {folder}",
        style="dim",
    )


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=progress_output(), transient=True)
