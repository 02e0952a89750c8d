"""The statistics file of LLMBar, by LLMBar's own definitions, to compare with the numbers its authors
published.

Its accuracies are plain counts in which a missing verdict is wrong. Its kappas are not what the name says:
verdicts are coded 1 for "1" and 0 for everything else, while labels are coded 1 and 2, so a verdict for
output 2 never agrees with a label (`LLMEvaluator/evaluate.py` of princeton-nlp/LLMBar keeps only the verdicts
"0" and "1"). `kappa_agreement` compares two sequences coded alike and is Cohen's kappa proper as long as no
verdict is missing. We reproduce them under their names and report the real kappa beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlme.judgebench.metrics import kappa


def llmbar_statistics(
    labels: Sequence[int], given: Sequence[int | None], swapped: Sequence[int | None]
) -> dict[str, str | float]:
    """LLMBar's `statistics.json` from labels (1 or 2) and the verdicts (1, 2 or None) in both presentation
    orders.
    """
    n = len(labels)
    right_given = sum(v == label for v, label in zip(given, labels, strict=True))
    right_swapped = sum(v == label for v, label in zip(swapped, labels, strict=True))
    both = sum(a == b == label for a, b, label in zip(given, swapped, labels, strict=True))
    equal = sum(a == b for a, b in zip(given, swapped, strict=True))

    def share(count: int) -> str:
        return f"{count} / {n} = {count / n * 100}%"

    coded_given, coded_swapped = ([int(v == 1) for v in verdicts] for verdicts in (given, swapped))
    kappa_given, kappa_swapped = kappa(coded_given, labels), kappa(coded_swapped, labels)
    return {
        "correct_False": share(right_given),
        "correct_True": share(right_swapped),
        "correct_average": f"{(right_given + right_swapped) / 2 / n * 100}%",
        "correct_both": share(both),
        "equal": share(equal),
        "kappa_False": kappa_given,
        "kappa_True": kappa_swapped,
        "kappa_average": (kappa_given + kappa_swapped) / 2,
        "kappa_agreement": kappa(coded_given, coded_swapped),
    }
