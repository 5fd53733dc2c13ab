"""Train the small target that ships with livedraft: ``python models/train_target.py --out models/tiny``.

A deep, narrow Llama: on a CPU, as for a big model on a GPU, its latency lies in its depth, so that what
speculation gains here is gained for the same reason.  About an hour on two cores.

Muon (Jordan et al. 2024) for the matrices, AdamW for embeddings and norms; trapezoidal schedule.  Writes
``config.json``, ``model.safetensors`` (bfloat16), the tokenizer with its chat template, held-out
``prompts.jsonl`` and ``training.json`` (held-out loss per domain, tokens seen, argv, versions).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Document, Domain, passages, read_code, read_prose
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS_PER_DOMAIN = 1600


def train_tokenizer(documents: list[Document], vocab_size: int, out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over equal amounts of both domains, saved in transformers' format."""
    bpe = ByteLevelBPETokenizer()
    by_domain = {d: "".join(x.text for x in documents if x.domain == d) for d in ("prose", "code")}
    size = min(map(len, by_domain.values()))
    rows = (line for text in by_domain.values() for line in text[:size].splitlines(keepends=True))
    bpe.train_from_iterator(rows, vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def chat(tokenizer: PreTrainedTokenizerFast, opening: str, continuation: str) -> list[int]:
    """Token ids of one exchange, exactly as the chat template renders it."""
    text = f"<|im_start|>user\n{opening.rstrip()}<|im_end|>\n<|im_start|>assistant\n{continuation.rstrip()}<|im_end|>\n"
    return tokenizer.encode(text)


def epoch(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """One pass over the documents, cut anew by ``seed``: every passage once, shuffled and concatenated, [tokens]."""
    rng = random.Random(seed)
    pairs = [pair for document in documents for pair in passages(document, rng)]
    rng.shuffle(pairs)
    return torch.tensor([token for pair in pairs for token in chat(tokenizer, *pair)], dtype=torch.int32)


def stream(train: list[Document], tokenizer: PreTrainedTokenizerFast, batch: int, length: int):
    """Yield [batch, length + 1] windows for ever, half prose and half code in every batch."""
    cursors: dict[Domain, tuple[int, int, Tensor]] = {"prose": (0, 0, torch.empty(0)), "code": (0, 0, torch.empty(0))}

    def take(domain: Domain) -> Tensor:
        seed, at, tokens = cursors[domain]
        if at + length + 1 > len(tokens):
            tokens, at, seed = epoch([d for d in train if d.domain == domain], tokenizer, seed), 0, seed + 1
        cursors[domain] = (seed, at + length, tokens)
        return tokens[at : at + length + 1].long()

    while True:
        yield torch.stack([take("prose" if i % 2 else "code") for i in range(batch)])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, length: int) -> float:
    """Mean cross-entropy in nats per token over the first 40 windows of ``tokens``."""
    windows = [tokens[i : i + length + 1].long() for i in range(0, len(tokens) - length - 1, length)][:40]
    losses = []
    for window in windows:
        logits = model(window[None, :-1]).logits[0].float()
        losses.append(F.cross_entropy(logits, window[1:]).item())
    return sum(losses) / len(losses)


def scale(fraction: float) -> float:
    """Trapezoidal learning-rate factor at ``fraction`` of the budget: 2 % warm-up, flat, last 35 % down to 0."""
    return min(1.0, fraction / 0.02, max(0.0, (1 - fraction) / 0.35))


def write_prompts(documents: list[Document], out: Path) -> None:
    """Held-out openings, one JSON object a line: ``{"domain", "document", "text"}``."""
    with out.open("w") as file:
        for domain in ("prose", "code"):
            rows = []
            # Cut short: more openings from the same documents than training passages would give.
            for document in (d for d in documents if d.domain == domain):
                for opening, _ in passages(document, random.Random(document.name), lines=(2, 4)):
                    rows.append({"domain": domain, "document": document.name, "text": opening.rstrip()})
            random.Random(0).shuffle(rows)
            for row in rows[:PROMPTS_PER_DOMAIN]:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    """Train, report, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--prose", type=Path, help="a dump of `bible -f Gen1:1-Rev22:21` (default: run it)")
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock training budget (default: 60)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens in a training window")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 (faster where the CPU has it)")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    documents = read_prose(args.prose) + read_code()
    train = [d for d in documents if not d.held_out]
    held = [d for d in documents if d.held_out]
    tokenizer = train_tokenizer(train, args.vocab, args.out)
    write_prompts(held, args.out / "prompts.jsonl")
    held_tokens = {d: epoch([x for x in held if x.domain == d], tokenizer, seed=0) for d in ("prose", "code")}

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Smaller output projections keep a deep residual stream's variance flat at start (GPT-2, section 2.3).
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1 / math.sqrt(2 * args.layers))
            layer.mlp.down_proj.weight.mul_(1 / math.sqrt(2 * args.layers))
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [o.param_groups[0]["lr"] for o in optimizers]

    losses, seen, started = [], 0, time.monotonic()
    bar = tqdm(total=args.minutes * 60, unit="s", desc=f"{parameters / 1e6:.1f} M parameters", disable=None)
    for window in stream(train, tokenizer, args.batch, args.length):
        elapsed = time.monotonic() - started
        if elapsed > args.minutes * 60:
            break
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale(elapsed / (args.minutes * 60))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = model(window[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += window[:, :-1].numel()
        losses.append(loss.item())
        bar.n = min(bar.total, round(elapsed))
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", tokens=f"{seen / 1e6:.2f}M")
        if len(losses) % 200 == 0:
            print(
                f"{elapsed:.0f} s {seen / 1e6:.2f} M tokens loss {sum(losses[-50:]) / 50:.3f}",
                file=sys.stderr,
                flush=True,
            )
    bar.close()

    # What ships is bfloat16, so that is what is measured.
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    shipped = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    report = {
        "parameters": parameters,
        "tokens_seen": seen,
        "seconds": round(time.monotonic() - started),
        "documents": {d: sum(x.domain == d for x in train) for d in ("prose", "code")},
        "held_out_documents": {d: sum(x.domain == d for x in held) for d in ("prose", "code")},
        "held_out_loss_nats_per_token": {
            d: round(held_out_loss(shipped, t, args.length), 4) for d, t in held_tokens.items()
        },
        "characters_per_token": {
            d: round(sum(map(len, (x.text for x in held if x.domain == d))) / max(1, len(t)), 3)
            for d, t in held_tokens.items()
        },
        "argv": sys.argv[1:],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
