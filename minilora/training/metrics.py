"""How close answers come to those that are wanted, under the names that the library `evaluate` gives these figures."""

from collections.abc import Sequence
from statistics import fmean


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of answers that are the one wanted, character for character."""
    return fmean(answer == right for answer, right in zip(answers, wanted, strict=True))


def rougeL(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequences of words, "ROUGE-L" (Lin 2004), without stemming.

    Raises:
        ImportError: the package rouge-score is missing (minilora.extras tells it before a run).
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return fmean(scorer.score(right, answer)["rougeL"].fmeasure for answer, right in zip(answers, wanted, strict=True))


METRICS = {"exact_match": exact_match, "rougeL": rougeL}
