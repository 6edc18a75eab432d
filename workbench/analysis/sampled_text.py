"""Text that a model samples, as an analysis: where profiles are kept, it is sampled once and not for every use."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from workbench.analysis.common import model_provenance
from workbench.analysis.profile import Profile
from workbench.corpus import Corpus, Document, Split, open_text
from workbench.corpus.base import check_split
from workbench.corpus.sampled import sampled_by
from workbench.models.base import LoadedModel
from workbench.progress import Job


class SampledText:
    """Documents sampled from the model (``corpus.sampled``): columns ``document``, ``text``, ``domain``, ``language``.

    Args:
        model: sampled from.
        split: whose random stream is used.
        n_tokens: to sample in all, rounded up to whole batches.
        seed: of the sampling.
        length: tokens per document; None for the default.
    """

    def __init__(
        self, model: LoadedModel, split: Split, n_tokens: int, *, seed: int = 0, length: int | None = None
    ) -> None:
        self._model, self._split, self._n_tokens, self._length = model, split, n_tokens, length
        parameters = {
            "split": split,
            "n_tokens": n_tokens,
            "length": length,
            "sampled_by": sampled_by(model),
        }
        self.provenance = model_provenance("sampled-text", model, None, seed, parameters)

    @property
    def parts(self) -> Sequence[str]:
        return ["documents"]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        corpus = open_text(
            "self",
            self._split,
            model=self._model,
            n_tokens=self._n_tokens,
            seed=self.provenance.seed,
            length=self._length,
            job=job,
        )
        rows = [(one.name, one.text, one.domain, one.language) for one in corpus.documents]
        return pd.DataFrame(rows, columns=["document", "text", "domain", "language"])


def sampled_corpus(profile: Profile) -> Corpus:
    """Return the text of a profile of ``SampledText``: what ``open_text`` gave when it was sampled."""
    split = check_split(profile.provenance.parameters["split"])
    return Corpus("self", split, tuple(Document(*row) for row in profile.table.itertuples(index=False, name=None)))
