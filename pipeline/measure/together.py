"""Several ranks score the source and its artifacts, a model on each card: subject k on rank k mod their number. Along a
long text they take every model together, each a part of the text's positions.

What a rank finds is a file in the run's folder, as it is when one process scores them all. So rank 0 reads in the end
what the others wrote, and a run that was ended goes on with any number of ranks.
"""

from __future__ import annotations

from functools import partial

from rich.progress import Progress

from qtool.evaluate.engines.share import Share
from qtool.evaluate.engines.table import ENGINES
from qtool.evaluate.scorecard import Scores
from qtool.measure.scores import Evaluation
from qtool.measure.subjects import Subject
from qtool.quantize.ranks import Ranks
from qtool.recipe.judging import EvaluateSection


def divisible(section: EvaluateSection) -> bool:
    """Whether the models can be dealt out: the engine computes on the card that it is told."""
    return not ENGINES[section.engine].facts.place


def score_together(evaluation: Evaluation, subjects: list[Subject], bar: Progress, ranks: Ranks) -> Scores:
    """As `Evaluation.score`, called by every rank with the same subjects; only rank 0 is told the scores. Raises
    QtoolError on the rank that finds the fault."""
    if ranks.number == 1:
        return evaluation.score(subjects, bar)
    if ranks.rank:
        ranks.tell(None)  # rank 0 has the source's distribution
    wanted, own = evaluation.begin(subjects), ranks.dealt(subjects)
    for number, subject in enumerate(own):
        first = not ranks.rank and not number
        evaluation.add(Scores(), subject, subjects[0], wanted, bar, partial(ranks.tell, None) if first else None)
    ranks.tell(None)  # every rank has scored its own
    if ranks.rank == 0:
        return evaluation.score(subjects, bar)
    evaluation.add_long(Scores(), subjects, bar)
    return Scores()


def share_of(ranks: Ranks) -> Share:
    """A rank's of a long text."""
    return Share(ranks.rank, ranks.number, ranks.gathered, ranks.tell)
