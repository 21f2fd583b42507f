"""Make the language model and the data sample that the package ships for its quickstart.

python scripts/make_demo.py DATA --out zolightning/demo

DATA is a folder with ``squad``, ``drop``, ``boolq`` and ``rotten_tomatoes``, each with ``train.jsonl`` and ``validation.jsonl``
(plain or gzipped, columns as on the Hugging Face hub). All four may be shared: CC BY-SA 4.0, CC BY-SA 4.0, CC BY-SA 3.0, CC BY 4.0.

1. Corpus: passages, questions and reviews of the training files. No answers, no labels, nothing of a validation file.
2. Tokenizer: lower-case byte-level BPE, trained on that corpus.
3. Model: a small Llama, trained from scratch on one CPU core.
4. Task: "what is this sentence about?", four classes. The quickstart's settings were chosen on the rows of ``tuning``; those of
   ``validation`` were drawn afterwards. Both come from validation files and share no run of eight words with the corpus or with
   each other.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Row = dict[str, Any]

SEED = 0
CLASSES = ("sports", "history", "science", "film")  # prompt: "{text}. this is about"; each class is one token after it
TRAIN_ROWS = dict.fromkeys(CLASSES, 400)
TUNING_ROWS = dict.fromkeys(CLASSES, 160)
VALIDATION_ROWS = TUNING_ROWS | {"sports": 84}  # all that are left
SHORTEST, LONGEST = 8, 18  # words of a snippet: the beginning of a sentence
SHARED_RUN = 8  # two texts that share so many consecutive words are near-identical

VOCABULARY = 3072
WHOLE_WORDS = "about football history science film"  # one token each
CONTEXT = 128
BATCH = 16
PEAK_LR = 3e-3
PHASES = (1500, 450)  # steps of 2,048 tokens: at a high rate, then, with a new optimizer, down to zero

# A passage belongs to a topic if it holds three of the topic's words; its sentences need hold none.
TOPIC_WORDS = {
    "sports": r"touchdowns?|field goals?|yards?|quarterback|fourth quarter|interceptions?|kickoff|fumble",
    "history": r"war|wars|battles?|kings?|troops|army|armies|siege|revolts?|treaty|empire|invasion|conquest|fleet|soldiers|dynasty|emperor",
    "science": (
        r"species|cells?|proteins?|bacteria|chemicals?|molecul\w+|atom\w*|energy|temperatures?|oxygen|genes?|genetic|dna|physics|theor\w+"
        r"|mathemat\w+|scientists?|organisms?|plants?|acids?|electr\w+|voltage|algorithms?|comput\w+|rocks?|geolog\w+|planets?|diseases?"
        r"|blood|immune|virus\w*|gas|gases|liquid|metals?|solar|quantum|equations?|tissues?|brain|animals?|heat|frequency"
    ),
}


def read(folder: Path, task: str, split: str) -> list[Row]:
    """The rows of one split, plain or gzipped."""
    path = folder / task / f"{split}.jsonl"
    text = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    return [json.loads(line) for line in text.decode().split("\n") if line]


def clean(text: str) -> str:
    """Plain punctuation without the blanks that a word tokenizer left before it."""
    for old, new in (
        ("\u2019", "'"),
        ("\u2018", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2013", "-"),
        ("\u2014", " - "),
        (" -- ", " - "),
    ):
        text = text.replace(old, new)
    text = re.sub(r"\s+([.,;:!?)\]%]|'(?:s|t|re|ve|ll|d|m)\b|n't)", r"\1", text)
    text = re.sub(r"([(\[])\s+", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r"\s+", " ", text).strip()


def passages(folder: Path, split: str) -> dict[str, dict[str, list[str]]]:
    """Source -> passage -> its questions, in a fixed order."""
    found: dict[str, dict[str, list[str]]] = {}
    for source, column in (("squad", "context"), ("drop", "passage"), ("boolq", "passage"), ("rotten_tomatoes", "text")):
        texts = found.setdefault(source, {})
        for row in read(folder, source, split):
            questions = texts.setdefault(clean(row[column]), [])
            if "question" in row:
                questions.append(clean(row["question"]))
    return found


def corpus(sources: dict[str, dict[str, list[str]]], rng: random.Random) -> list[str]:
    """Documents for pretraining: a passage with a few of its questions, or six reviews."""
    documents = []
    for source, texts in sources.items():
        if source == "rotten_tomatoes":
            reviews = list(texts)
            rng.shuffle(reviews)
            documents += [" ".join(reviews[start : start + 6]) for start in range(0, len(reviews), 6)]
        else:
            for text, questions in texts.items():
                asked = rng.sample(questions, min(4, len(questions)))
                documents.append(" ".join([text, *(q if q.endswith("?") else f"{q}?" for q in asked)]))
    rng.shuffle(documents)
    return documents


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of ``SHARED_RUN`` consecutive words."""
    found = words(text)
    return {tuple(found[i : i + SHARED_RUN]) for i in range(len(found) - SHARED_RUN + 1)}


def topic(source: str, passage: str) -> str | None:
    """What a whole passage is about: by its source and three words; None if unclear."""
    if source == "rotten_tomatoes":
        return "film"
    hits = {name: len(re.findall(rf"\b(?:{pattern})\b", passage.lower())) for name, pattern in TOPIC_WORDS.items()}
    allowed = {"drop": ("sports", "history"), "squad": ("history", "science"), "boolq": ("science",)}[source]
    best = max(allowed, key=lambda name: hits[name])
    clear = hits[best] >= 3 and all(2 * hits[name] <= hits[best] for name in hits if name != best)
    return best if clear else None


def snippets(passage: str, whole: bool) -> Iterator[str]:
    """Beginnings of the sentences that can stand alone: lower case, without the final full stop."""
    for part in [passage] if whole else re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", passage):
        if len(part.split()) >= SHORTEST and (whole or (re.match(r"[A-Z\"']", part) and re.search(r"[a-z0-9)\"'][.!?]$", part))):
            yield " ".join(part.lower().split()[:LONGEST]).rstrip(" .,;:-")


def task_rows(
    sources: dict[str, dict[str, list[str]]], wanted: dict[str, int], seen: set[tuple[str, ...]], rng: random.Random
) -> list[Row]:
    """So many rows of each class; one that shares a run of words with ``seen`` or an earlier row is dropped. Adds to ``seen``."""
    pools: dict[str, list[tuple[str, str]]] = {name: [] for name in CLASSES}
    for source, texts in sources.items():
        for passage in texts:
            name = topic(source, passage)
            if name:
                pools[name] += [(text, source) for text in snippets(passage, whole=source == "rotten_tomatoes")]
    rows: list[Row] = []
    for label, name in enumerate(CLASSES):
        rng.shuffle(pools[name])
        taken = 0
        for text, source in pools[name]:
            own = runs(text)
            if own and not own & seen and taken < wanted[name]:
                seen |= own
                taken += 1
                rows.append({"text": text, "label": label, "topic": name, "source": source})
        if taken < wanted[name]:
            raise ValueError(f"only {taken} snippets about {name}, {wanted[name]} are needed")
    rng.shuffle(rows)
    return rows


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Lower-case byte-level BPE; every sequence begins with ``<s>``."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*documents, *[WHOLE_WORDS] * 100], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256)


def build(vocabulary: int) -> LlamaForCausalLM:
    """The untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=160,
            intermediate_size=416,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def rate(phase: int, step: int) -> float:
    """Learning rate: half a cosine wave down to half its height in the first phase, then linear to (almost) zero."""
    fraction = step / PHASES[phase]
    height = 0.51 + 0.49 * math.cos(0.5 * math.pi * fraction) if phase == 0 else 0.5 * (1 - fraction) + 0.01
    return PEAK_LR * min((step + 1) / (100, 20)[phase], height)


def pretrain(model: LlamaForCausalLM, stream: Tensor, phase: int) -> None:
    """AdamW over blocks of the token stream, which is cut anew in every epoch."""
    generator = torch.Generator().manual_seed(SEED + phase)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    queue: list[Tensor] = []
    model.train()
    start, mean = time.time(), 0.0
    for step in range(PHASES[phase]):
        while len(queue) < BATCH:
            offset = int(torch.randint(CONTEXT, (), generator=generator))
            count = (len(stream) - offset) // CONTEXT
            blocks = stream[offset : offset + count * CONTEXT].view(count, CONTEXT)
            queue += list(blocks[torch.randperm(count, generator=generator)])
        batch, queue = torch.stack(queue[:BATCH]), queue[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate(phase, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += (float(loss.detach()) - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            speed = (step + 1) * BATCH * CONTEXT / (time.time() - start)
            print(f"phase {phase + 1}, step {step + 1:5d}/{PHASES[phase]}  loss {mean:.3f}  {speed:,.0f} tokens/s", flush=True)
    model.eval()


def store(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder with float16 weights that older releases of transformers load too."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    model.float()
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("backend", "is_local"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[float, float]:
    """Perplexity per token, and bits per byte; each text on its own, cut at the context."""
    total, tokens, size = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=CONTEXT)["input_ids"]])
        if ids.shape[1] > 1:
            total += float(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
            size += len(tokenizer.decode(ids[0, 1:]).encode())
    return math.exp(total / tokens), total / size / math.log(2)


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """A sampled continuation (temperature 0.8, top 40)."""
    torch.manual_seed(SEED)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    return tokenizer.decode(
        model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=0.8, top_k=40, max_new_tokens=40)[0],
        skip_special_tokens=True,
    )


def one_word_rule(train: list[Row], validation: list[Row]) -> tuple[str, float]:
    """The rule "if word w occurs (anywhere, as first word) class a, else class b" that is best on training rows."""
    rules: dict[tuple[str, str], Counter[int]] = {}
    for row in train:
        for where, found in (("anywhere", set(words(row["text"]))), ("first", set(words(row["text"])[:1]))):
            for word in found:
                rules.setdefault((where, word), Counter())[row["label"]] += 1
    overall = Counter(row["label"] for row in train)
    best = (0, "", "", 0, 0)
    for (where, word), counts in sorted(rules.items()):
        yes, right = counts.most_common(1)[0]
        no, wrong = max(((k, overall[k] - counts[k]) for k in range(len(CLASSES))), key=lambda pair: pair[1])
        best = max(best, (right + wrong, where, word, yes, no))
    _, where, word, yes, no = best
    hits = 0
    for row in validation:
        spelled = words(row["text"])
        hits += (yes if word in (spelled if where == "anywhere" else spelled[:1]) else no) == row["label"]
    return f"if {word!r} occurs ({where}) {CLASSES[yes]}, else {CLASSES[no]}", hits / len(validation)


def bag_of_words(train: list[Row], validation: list[Row]) -> float:
    """Accuracy of logistic regression on word presence; its weight decay is chosen on a fifth of the training rows."""
    cut = len(train) * 4 // 5
    scores = {decay: _fit_words(train[:cut], train[cut:], decay) for decay in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
    return _fit_words(train, validation, max(scores, key=lambda decay: scores[decay]))


def _fit_words(train: list[Row], test: list[Row], decay: float) -> float:
    counts = Counter(word for row in train for word in set(words(row["text"])))
    index = {word: i for i, word in enumerate(sorted(counts))}

    def features(rows: list[Row]) -> Tensor:
        table = torch.zeros(len(rows), len(index) + 1)
        for i, row in enumerate(rows):
            table[i, [index[w] for w in set(words(row["text"])) if w in index] + [len(index)]] = 1.0
        return table

    x, y = features(train), torch.tensor([row["label"] for row in train])
    weight = torch.zeros(x.shape[1], len(CLASSES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, y) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    guess = (features(test) @ weight.detach()).argmax(1)
    return float((guess == torch.tensor([row["label"] for row in test])).float().mean())


def write(rows: list[Row], path: Path) -> None:
    """Gzipped JSON lines, the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def main() -> None:
    """Run the whole recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with squad, drop, boolq and rotten_tomatoes")
    parser.add_argument("--out", type=Path, default=Path("zolightning/demo"))
    parser.add_argument("--resume", type=Path, help="weights after the first phase of pretraining, which is then left out")
    parser.add_argument("--data-only", action="store_true", help="write rows and tokenizer, train no model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(SEED)

    sources = passages(options.data, "train")
    documents = corpus(sources, rng)
    train = task_rows(sources, TRAIN_ROWS, set(), rng)
    seen = {run for document in documents for run in runs(document)}
    for texts in sources.values():
        seen |= {run for text, questions in texts.items() for part in (text, *questions) for run in runs(part)}
    held_out = passages(options.data, "validation")
    tuning = task_rows(held_out, TUNING_ROWS, seen, rng)
    validation = task_rows(held_out, VALIDATION_ROWS, seen, rng)
    for name, rows in (("train", train), ("tuning", tuning), ("validation", validation)):
        write(rows, options.out / "data" / f"{name}.jsonl.gz")
        print(f"rows: {len(rows)} {name}")
    for row in train[:12]:
        print(f"  {row['topic']:9s} {row['text']}")
    for name, rows in (("tuning", tuning), ("validation", validation)):
        majority = Counter(row["label"] for row in rows).most_common(1)[0][1] / len(rows)
        rule, accuracy = one_word_rule(train, rows)
        print(f"{name}: majority class {majority:.3f}, best one-word rule {accuracy:.3f} ({rule})")
        print(f"{name}: bag of words {bag_of_words(train, rows):.3f}", flush=True)

    tokenizer = train_tokenizer(documents)
    for name in CLASSES:
        assert len(tokenizer(f"x {name}")["input_ids"]) == len(tokenizer("x")["input_ids"]) + 1, name
    stream = torch.tensor([token for ids in tokenizer(documents, verbose=False)["input_ids"] for token in ids])
    print(f"corpus: {len(documents)} documents, {sum(len(d.split()) for d in documents):,} words, {len(stream):,} tokens", flush=True)
    if options.data_only:
        tokenizer.save_pretrained(options.out / "model")
        return
    torch.manual_seed(SEED)
    model = build(len(tokenizer))
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    if options.resume:
        model.load_state_dict(torch.load(options.resume))
    else:
        pretrain(model, stream, 0)
    pretrain(model, stream, 1)
    store(model, tokenizer, options.out / "model")
    model = LlamaForCausalLM.from_pretrained(options.out / "model", dtype=torch.float32).eval()

    everything: list[str] = []
    for source, texts in held_out.items():
        chosen = random.Random(SEED).sample(sorted(texts), min(200, len(texts)))
        everything += chosen
        print("held-out perplexity, {:16s} {:6.1f}, {:.2f} bits a byte".format(source, *perplexity(model, tokenizer, chosen)))
    print("held-out perplexity, {:16s} {:6.1f}, {:.2f} bits a byte".format("all", *perplexity(model, tokenizer, everything)))
    for prompt in ("In the second quarter, the Ravens", "The film is", "In 1812, the French army", "A protein is", "The city of"):
        print("sample:", sample(model, tokenizer, prompt))


if __name__ == "__main__":
    main()
