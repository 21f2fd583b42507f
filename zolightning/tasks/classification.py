"""Tasks with a fixed set of classes: the prompts of MeZO, whose figures the papers compare with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Example, Task, class_index


class ClassificationTask(Task):
    """A task whose rows share one list of candidates.

    Attributes:
        candidates: The continuation of each class, in the order of the label numbers.
    """

    candidates: ClassVar[tuple[str, ...]]

    @abstractmethod
    def prompt(self, row: Mapping[str, Any]) -> str:
        """Text before the candidate."""

    def example(self, row: Mapping[str, Any]) -> Example:
        """Turn one row into its prompt, the class names and the label."""
        return Example(self.prompt(row), self.candidates, class_index(row.get(self.target), len(self.candidates)))


class SST2(ClassificationTask):
    """Sentiment of a sentence from a film review (GLUE)."""

    hub = ("nyu-mll/glue", "sst2")
    candidates = (" terrible", " great")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The sentence and ``It was``."""
        return f"{row['sentence'].strip()} It was"


class RottenTomatoes(ClassificationTask):
    """Sentiment of a sentence from a film review (the sentence polarity data set), prompted as SST-2."""

    hub = ("cornell-movie-review-data/rotten_tomatoes", None)
    candidates = (" terrible", " great")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The sentence and ``It was``."""
        return f"{row['text'].strip()} It was"


class CB(ClassificationTask):
    """CommitmentBank (SuperGLUE): does the premise entail the hypothesis?"""

    hub = ("aps/super_glue", "cb")
    candidates = ("Yes", "No", "Maybe")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The premise and the question."""
        return f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'


class RTE(ClassificationTask):
    """Recognising textual entailment (SuperGLUE); label 0 is entailment."""

    hub = ("aps/super_glue", "rte")
    candidates = ("Yes", "No")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The premise and the question."""
        return f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'


class BoolQ(ClassificationTask):
    """Yes/no questions about a passage; candidate 0 is Yes, as in MeZO."""

    hub = ("google/boolq", None)
    target = "answer"
    candidates = ("Yes", "No")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The passage and the question, with a capital and a question mark."""
        question = row["question"] if row["question"].endswith("?") else row["question"] + "?"
        return f"{row['passage']} {question[:1].upper()}{question[1:]}\n"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Turn one row into its prompt; the answer True is candidate 0."""
        answer = class_index(row.get(self.target), 2)
        return Example(self.prompt(row), self.candidates, None if answer is None else 1 - answer)


class WSC(ClassificationTask):
    """Winograd schemas (SuperGLUE, fixed spans): does the pronoun refer to the noun?"""

    hub = ("aps/super_glue", "wsc.fixed")
    candidates = ("No", "Yes")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The text and the question."""
        return (
            f"{row['text']}\nIn the previous sentence, does the pronoun "
            f'"{row["span2_text"].lower()}" refer to {row["span1_text"]}? Yes or No?\n'
        )


class WiC(ClassificationTask):
    """Words in context (SuperGLUE): does the word mean the same in both sentences?"""

    hub = ("aps/super_glue", "wic")
    candidates = ("No", "Yes")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The question and the two sentences."""
        return (
            f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?\n'
            f"{row['sentence1']}\n{row['sentence2']}\n"
        )


class MultiRC(ClassificationTask):
    """Multi-sentence reading (SuperGLUE): is this answer to the question right?"""

    hub = ("aps/super_glue", "multirc")
    candidates = ("No", "Yes")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The paragraph, the question and the proposed answer."""
        return f'{row["paragraph"]}\nQuestion: {row["question"]}\nI found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
