"""Baselines of translation that count: a lexicon with spelling rules, and the nearest example."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from mpjax.data.pairs import Pair
from mpjax.errors import need

_LONGEST = 3  # characters of a target piece
_SCANS = 4  # iterations of Viterbi training
_ALIGNED = 20_000  # pairs of words, the most frequent
_UNSEEN = math.log(1e-6)  # log-probability of a piece without a count


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """What each word, and inside unknown words each character, most often becomes.

    Words are counted where both sides have as many, and paired by their place. Characters are
    aligned by `align`; a character becomes the piece that is most frequent between its two
    neighbours, or behind its left one, or at all.

    Args:
        words: source word -> target word.
        pieces: (left, character, right) -> what it becomes; empty text where a neighbour is open.

    Example:
        >>> train = [("ab a", "XY X"), ("ba", "YX"), ("b", "Y"), ("b", "why")]
        >>> lexicon = learn_lexicon(train)
        >>> lexicon.translate("ba b"), lexicon.translate("bab")
        ('YX Y', 'YXY')
    """

    words: dict[str, str]
    pieces: dict[tuple[str, str, str], str]

    def translate(self, text: str) -> str:
        """Returns the target of a text, word by word."""
        return " ".join(self.words.get(w) or self._spelled(w) for w in text.split())

    def _spelled(self, word: str) -> str:
        out = []
        for left, c, right in _contexts(word):
            tries = ((left, c, right), (left, c, ""), ("", c, ""))
            out.append(next((self.pieces[t] for t in tries if t in self.pieces), ""))
        return "".join(out)


def learn_lexicon(pairs: Sequence[Pair]) -> Lexicon:
    """Counts a lexicon on training pairs; ties go to what came first."""
    counts: dict[str, Counter[str]] = {}
    for source, target in pairs:
        sides = source.split(), target.split()
        if len(sides[0]) == len(sides[1]):
            for a, b in zip(*sides, strict=True):
                counts.setdefault(a, Counter())[b] += 1
    both = Counter({(a, b): n for a, found in counts.items() for b, n in found.items()})
    frequent = both.most_common(_ALIGNED)
    pieces: dict[tuple[str, str, str], Counter[str]] = {}
    for ((a, _), n), parts in zip(frequent, align(frequent), strict=True):
        for (left, c, right), piece in zip(_contexts(a), parts, strict=False):
            for context in ((left, c, right), (left, c, ""), ("", c, "")):
                pieces.setdefault(context, Counter())[piece] += n
    return Lexicon(
        {a: found.most_common(1)[0][0] for a, found in counts.items()},
        {context: found.most_common(1)[0][0] for context, found in pieces.items()},
    )


def align(words: Sequence[tuple[Pair, int]]) -> list[list[str]]:
    r"""Cuts each target word into a piece for each character of its source, in order.

    Chooses the pieces with the largest $\sum_i \log p(\text{piece}_i \mid c_i)$, of at most three
    characters each, and counts $p$ anew from what was chosen, a few times over (Viterbi
    training). At the start shorter differences from an even cut are likelier.

    Args:
        words: ((source, target), count) pairs.

    Returns:
        For each pair the pieces; none where the target is too long for its source.
    """
    scores: dict[tuple[str, str], float] = {}
    totals: Counter[str] = Counter()
    chosen: list[list[str]] = []
    for scan in range(_SCANS):
        chosen = [_cut(a, b, scores if scan else None) for (a, b), _ in words]
        counts: Counter[tuple[str, str]] = Counter()
        totals.clear()
        for ((a, _), n), parts in zip(words, chosen, strict=True):
            for c, piece in zip(a, parts, strict=False):
                counts[c, piece] += n
                totals[c] += n
        scores = {key: math.log(n / totals[key[0]]) for key, n in counts.items()}
    return chosen


def _cut(source: str, target: str, scores: dict[tuple[str, str], float] | None) -> list[str]:
    """The best pieces of one target; without scores, those nearest to an even cut."""
    S, T = len(source), len(target)
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # end -> score, start of the piece
    for i, c in enumerate(source, 1):
        row: dict[int, tuple[float, int]] = {}
        for start, (score, _) in best[-1].items():
            for end in range(start, min(start + _LONGEST, T) + 1):
                if T - end > _LONGEST * (S - i):
                    continue  # the rest would not fit
                own = -abs(end - i * T / S)
                if scores is not None:
                    own = scores.get((c, target[start:end]), _UNSEEN)
                if end not in row or score + own > row[end][0]:
                    row[end] = (score + own, start)
        best.append(row)
    if T not in best[-1]:
        return []
    pieces, end = [], T
    for row in reversed(best[1:]):
        start = row[end][1]
        pieces.append(target[start:end])
        end = start
    return pieces[::-1]


def _contexts(word: str) -> list[tuple[str, str, str]]:
    """Each character between its neighbours; the ends of a word are spaces."""
    return list(zip(f" {word}", word, f"{word[1:]} ", strict=False))


def nearest_targets(pairs: Sequence[Pair], texts: Sequence[str]) -> list[str]:
    """Returns for each text the target of the training source that is most like it.

    Likeness is the cosine of TF-IDF vectors of two and three characters, as a translation memory
    would have it.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    text = need("sklearn.feature_extraction.text", "tasks", "baseline")
    neighbours = need("sklearn.neighbors", "tasks", "baseline").NearestNeighbors
    grams = text.TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3))
    known = grams.fit_transform([source for source, _ in pairs])
    index = neighbours(n_neighbors=1, metric="cosine", algorithm="brute").fit(known)
    rows = index.kneighbors(grams.transform(texts), return_distance=False)[:, 0]
    return [pairs[int(row)][1] for row in rows]
