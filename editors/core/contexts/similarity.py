"""How similar texts are: by their words, by the model's own hidden states, or by a model of sentences.

tfidf       cosine of the texts' weighted words (tf_idf.py), with weights learned on the documents
hidden      cosine of the mean of the decoder's output over a text's tokens, less the mean over the documents
sentence    cosine of the embeddings of sentence-transformers, as in the original IKE (an extra)
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from errata.editors.core.contexts.context import Encoder
from errata.editors.core.contexts.tf_idf import TfIdf, product
from errata.editors.core.errors import ConfigError
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer, pad_id, prompt_ids, right_padded

BATCH_TOKENS = 8192


def similarities(
    encoder: Encoder,
    documents: Sequence[str],
    queries: Sequence[str],
    *,
    model: nn.Module,
    tokenizer: Tokenizer,
    sentence_encoder: str = "",
) -> list[list[float]]:
    """Return the cosine of each query with each document.

    Args:
        encoder: What is compared.
        documents: The texts that words and means are counted in.
        queries: The texts to compare with each document.
        model: The model, whose hidden states are compared.
        tokenizer: Its tokenizer.
        sentence_encoder: Name or folder of a model of sentence-transformers.

    Returns:
        For each query, one number per document.

    Raises:
        ConfigError: sentence-transformers is not installed.
    """
    if encoder == "tfidf":
        return _tfidf(documents, queries)
    distinct = list(dict.fromkeys([*documents, *queries]))
    vectors = _hidden(model, tokenizer, distinct) if encoder == "hidden" else _sentences(sentence_encoder, distinct)
    at = {text: i for i, text in enumerate(distinct)}
    rows, columns = ([at[text] for text in texts] for texts in (queries, documents))
    if encoder == "hidden" and len(documents) > 1:
        vectors = vectors - vectors[columns].mean(dim=0)
    unit = normalize(vectors.double(), dim=-1)
    return (unit[rows] @ unit[columns].T).tolist()


def _tfidf(documents: Sequence[str], queries: Sequence[str]) -> list[list[float]]:
    weights = TfIdf.of(documents)
    vectors = [weights.vector(text) for text in documents]
    return [[product(asked, vector) for vector in vectors] for asked in map(weights.vector, queries)]


@torch.inference_mode()
def _hidden(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    architecture, pad = describe(model), pad_id(tokenizer)
    ids = [tuple(prompt_ids(tokenizer, text)) or (pad,) for text in texts]
    rows = sorted(set(ids), key=lambda row: (len(row), row))
    means: dict[tuple[int, ...], Tensor] = {}
    with evaluating(model):
        for group in batches_by_length(rows, limit_batch_tokens(BATCH_TOKENS, architecture.device)):
            batch = right_padded(group, pad).to(architecture.device)
            hidden = run_base(architecture, batch).double()  # (b, l, d)
            mask = batch.mask[..., None].to(hidden)
            means |= zip(group, ((hidden * mask).sum(1) / mask.sum(1)).cpu(), strict=True)
    return torch.stack([means[row] for row in ids])


def _sentences(name: str, texts: Sequence[str]) -> Tensor:
    try:
        library: Any = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ConfigError(
            "encoder=sentence needs sentence-transformers: pip install -e '.[sentence]'; or use tfidf or hidden"
        ) from error
    return torch.as_tensor(library.SentenceTransformer(name).encode(list(texts), convert_to_tensor=True)).cpu()
