"""A loss of this library in the trainer of sentence-transformers.

    cd examples && python -m clients.sentence_pairs

A model learns to find the French of an English phrase, on pairs that are made here: without a
download. With your own data and `SentenceTransformer("...")` nothing else changes.
"""

import random

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from contrastive_kit import InfoNCE

COLORS = {
    "red": "rouge",
    "green": "vert",
    "blue": "bleu",
    "black": "noir",
    "white": "blanc",
    "pink": "rose",
}
ANIMALS = {
    "fox": "renard",
    "dog": "chien",
    "cat": "chat",
    "wolf": "loup",
    "bear": "ours",
    "hare": "lapin",
}
PLACES = {
    "forest": "forêt",
    "garden": "cour",
    "river": "rivière",
    "street": "rue",
    "house": "maison",
}


class InBatchNegatives(nn.Module):
    """What `MultipleNegativesRankingLoss` computes, in memory linear in the batch.

    Columns of the data set are anchor, positive and, if there are more, mined negatives. Over
    several processes `gather_distributed=True` takes the pairs of all, with exact gradients.
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = InfoNCE(1 / scale, in_batch_negatives=True, gather_distributed=True)

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss of one batch; `labels` are not used."""
        embeddings = [self.model(column)["sentence_embedding"] for column in sentence_features]
        anchors, positives, *mined = embeddings
        return self.loss_fn(anchors, positives, negatives=torch.cat(mined) if mined else None)


def phrases() -> list[tuple[str, str]]:
    """All 180 phrases in both languages, shuffled."""
    pairs = [
        (f"the {color} {animal} in the {place}", f"le {animal_fr} {color_fr} dans la {place_fr}")
        for color, color_fr in COLORS.items()
        for animal, animal_fr in ANIMALS.items()
        for place, place_fr in PLACES.items()
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def small_model(pairs: list[tuple[str, str]], dim: int = 64) -> SentenceTransformer:
    """The mean of the embeddings of the words: a model without a checkpoint."""
    words = sorted({word for pair in pairs for phrase in pair for word in phrase.split()})
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=dim)], device="cpu"
    )


def main(steps: int = 100, out: str = "runs/sentences") -> tuple[float, float]:
    """Train; the share of unseen phrases whose French was nearest, before and after."""
    torch.manual_seed(0)
    pairs = phrases()
    train, test = pairs[:120], pairs[120:]
    model = small_model(pairs)

    def found() -> float:
        english, french = (
            model.encode(list(side), convert_to_tensor=True, normalize_embeddings=True)
            for side in zip(*test, strict=True)
        )
        nearest = (english @ french.T).argmax(dim=1).cpu()
        return (nearest == torch.arange(len(test))).float().mean().item()

    before = found()
    options = SentenceTransformerTrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=40,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    columns = dict(zip(("anchor", "positive"), zip(*train, strict=True), strict=True))
    trainer = SentenceTransformerTrainer(
        model, options, Dataset.from_dict(columns), loss=InBatchNegatives(model)
    )
    trainer.train()
    after = found()
    print(f"French found for {before:.0%} of unseen phrases before, {after:.0%} after")
    return before, after


if __name__ == "__main__":
    main()
