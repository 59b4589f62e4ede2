"""Trains the small frozen language model of the examples, and its tokenizer.

    python examples/base_model.py [--out examples/base_model] [--steps 1800]

It reads documents of `tickets.py`: a ticket, then questions on it with their answers. The model learns the facts of a ticket one by one and
the higher of some of them, never the higher of urgency and anger: ordering the queue is what the prompt is tuned for.

Writes: config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, README.md.
The result is the same, byte for byte, for the same torch, processor type and number of threads.
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tickets import (
    CARD_SENTENCES,
    CHANNELS,
    GRADED,
    LEVELS,
    MAIL_SENTENCES,
    PHONE_SENTENCES,
    REGIONS,
    Mix,
    card_number,
    higher,
    mail,
    phone_number,
    ticket,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
STEPS = 1800
BATCH = 16
"""Documents per step."""
POOL = 8
"""Batches that are sorted by length together, so that little is padded."""
TOKENIZER_DOCUMENTS = 4000
VOCABULARY = 1280
HIDDEN = 128
LAYERS = 4
HEADS = 4
LEARNING_RATE = 3e-3
WARM_UP = 50
"""Steps."""
ANSWER_WEIGHT = 5.0
"""Weight of an answer token in the loss; any other token weighs 1."""
THREADS = 1

PAD, EOS = "<pad>", "<eos>"
MIX = Mix()
FOLLOW_UPS = 9
BARE = 0.3
"""Share of documents that open without an instruction."""

QUESTIONS = {
    "urgency": ("How urgent is the ticket?", "Rate the urgency.", "How fast must we react?"),
    "anger": ("How angry is the customer?", "Rate the anger.", "How upset is the writer?"),
    "value": ("How valuable is the customer?", "Rate the value.", "How important is the writer?"),
    "impact": ("How big is the impact?", "Rate the impact.", "How much work stands still?"),
    "product": ("Which product is it?", "Name the product."),
    "problem": ("What is the problem?", "Name the problem."),
    "request": ("What does the customer want?", "Name the request."),
}
COMBINATIONS = (
    ("urgency", "value"),
    ("urgency", "impact"),
    ("anger", "value"),
    ("anger", "impact"),
    ("value", "impact"),
    ("urgency", "value", "impact"),
    ("anger", "value", "impact"),
)
"""Facts whose highest level is asked for. Urgency and anger are never in one question."""

Document = list[tuple[str, bool]]
"""Pieces of text, each with whether it is an answer."""

README = """# Base model of the examples

A Llama with {parameters:,} parameters ({layers} layers, hidden size {hidden}) and a BPE tokenizer with {vocabulary:,} entries.
The tokenizer falls back to bytes, so that any text survives encoding and decoding. A literal special token in a text, such as `<eos>`,
is encoded as ordinary characters (`split_special_tokens` in `tokenizer_config.json`).

Trained by `make base-model`: {steps:,} steps of {batch} made-up documents, seed {seed}. It knows single facts of a support ticket and has
never read what the example prompt asks for. It is of use for trying Retune out, and for nothing else. The hash of the folder stands in
`prompts/ticket_priority.yaml`.
"""


def question(rng: random.Random, facts: dict[str, str]) -> tuple[str, str]:
    """A question on a ticket, and its answer."""
    x = rng.random()
    if x < 0.45:
        fact = rng.choice(GRADED)
        return rng.choice(QUESTIONS[fact]), facts[fact]
    if x < 0.68:
        combination = list(rng.choice(COMBINATIONS))
        rng.shuffle(combination)
        listed = ", ".join(combination[:-1]) + " and " + combination[-1]
        return f"Take the {'higher' if len(combination) == 2 else 'highest'} of {listed}.", higher(*(facts[f] for f in combination))
    if x < 0.85:
        fact = rng.choice(("product", "problem", "request"))
        return rng.choice(QUESTIONS[fact]), facts[fact]
    return rng.choice(
        (
            ("Name product and problem.", f"{facts['product']}: {facts['problem']}"),
            ("Name problem and request.", f"{facts['problem']}; customer wants {facts['request']}"),
            ("Name product and request.", f"{facts['product']}; customer wants {facts['request']}"),
        )
    )


def contact(rng: random.Random, region: str) -> str:
    """A sentence with personal data, or with what a redactor leaves in its place."""
    sentences, value, placeholder = rng.choice(
        (
            (MAIL_SENTENCES, mail(rng, region), "EMAIL"),
            (PHONE_SENTENCES, phone_number(rng, region), "PHONE"),
            (CARD_SENTENCES, card_number(rng), "CARD"),
        )
    )
    return rng.choice(sentences).format(x=rng.choice((value, f"[{placeholder}]", f"<{placeholder.lower()}>")))


def document(rng: random.Random) -> Document:
    """A ticket with its first question before it (or none), the answer, and further questions with answers."""
    region = rng.choice(REGIONS)
    read = ticket(rng, MIX, rng.choice(CHANNELS), region)
    text = read.text if rng.random() < 0.92 else f"{read.text} {contact(rng, region)}"
    asked, answer = question(rng, read.facts)
    opening = "" if rng.random() < BARE else asked + "\n"
    pieces: Document = [(f"{opening}Ticket: {text}\nAnswer:", False), (" " + answer, True)]
    for _ in range(FOLLOW_UPS):
        asked, answer = question(rng, read.facts)
        pieces += [(f"\n{asked}\nAnswer:", False), (" " + answer, True)]
    return pieces


def documents(purpose: str) -> Iterator[Document]:
    """The endless stream of documents for a purpose: `tokenizer` or `model`."""
    rng = random.Random(f"{purpose}/{SEED}")
    while True:
        yield document(rng)


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pair encoding that keeps every space and falls back to bytes."""
    stream = documents("tokenizer")
    texts = ("".join(text for text, _ in next(stream)) for _ in range(TOKENIZER_DOCUMENTS))
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|\s| ?[^\s\p{L}\p{N}]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [PAD, EOS, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [t for t in trained["added_tokens"] if t["content"] in (PAD, EOS)]  # bytes are ordinary tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(trained)),
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights, both [B, T], of documents of like length."""
    rng, stream = random.Random(f"order/{SEED}"), documents("model")
    while True:
        encoded = []
        for _ in range(BATCH * POOL):
            pieces = next(stream)
            ids, weights = [], []
            for piece_ids, (_, answer) in zip(
                tokenizer([t for t, _ in pieces], add_special_tokens=False)["input_ids"], pieces, strict=True
            ):
                piece_ids += [tokenizer.eos_token_id] if answer else []
                ids += piece_ids
                weights += [ANSWER_WEIGHT if answer else 1.0] * len(piece_ids)
            encoded.append((ids, weights))
        encoded.sort(key=lambda e: len(e[0]))
        starts = list(range(0, len(encoded), BATCH))
        rng.shuffle(starts)
        for start in starts:
            rows = encoded[start : start + BATCH]
            longest = max(len(ids) for ids, _ in rows)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows]),
                torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows]),
            )


def train_model(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A Llama trained from scratch on the documents."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=HIDDEN * 11 // 4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started = time.monotonic()
    for step, (ids, weights) in zip(range(steps), batches(tokenizer), strict=False):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * (0.05 + 0.95 * cosine)
        logits = model(input_ids=ids).logits[:, :-1]  # padded on the right under causal attention: no mask needed
        targets, weights = ids[:, 1:], weights[:, 1:]
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none").view_as(targets)
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            answers, others = losses[weights == ANSWER_WEIGHT].mean().item(), losses[weights == 1].mean().item()
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  {seconds:.0f} s  loss of answers {answers:.3f}  of other text {others:.3f}", flush=True)
    return model.eval()


def folder_sha256(folder: Path) -> str:
    """Hash over all files of a folder except README.md and hidden ones."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    kept = {name: p for name, p in files.items() if name != "README.md" and not any(part.startswith(".") for part in name.split("/"))}
    hashes = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in kept.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the base model of the examples.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base_model")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    tokenizer = train_tokenizer(VOCABULARY)
    print(
        f"vocabulary {len(tokenizer)}; tokens of the levels: {[len(tokenizer(' ' + level)['input_ids']) for level in LEVELS]}", flush=True
    )
    model = train_model(tokenizer, arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    readme = README.format(
        parameters=model.num_parameters(),
        layers=LAYERS,
        hidden=HIDDEN,
        vocabulary=len(tokenizer),
        steps=arguments.steps,
        batch=BATCH,
        seed=SEED,
    )
    (arguments.out / "README.md").write_text(readme, encoding="utf-8")
    print(f"{arguments.out}: sha256 {folder_sha256(arguments.out)}")


if __name__ == "__main__":
    main()
