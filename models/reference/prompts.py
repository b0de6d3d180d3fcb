"""Write calibration_prompts.txt: facts in calibration text, then questions and their answers.

A profile that is fitted to prose alone has not seen how the model recalls names, and treats what
recall needs as unimportant. Filler, seeds and so facts are others than any evaluation uses.

    python models/reference/prompts.py
"""

from __future__ import annotations

from pathlib import Path

from cachegen.bench.retrieval import RetrievalPrompt, RetrievalTask, Vocabulary
from cachegen.bench.workload import CALIBRATION_SEED
from cachegen.hf.load import begin_and_text, load_model

MODEL = Path(__file__).parent
PROMPTS = 10
# A context of 1,024 tokens: its beginning, facts in text, 80 questions of 3 tokens with answers.
PREFIX_TOKENS = 784
FACTS = 40


def with_answers(prompt: RetrievalPrompt) -> list[int]:
    """Return the ids of a prompt without its beginning, every question asked and answered twice."""
    asked = [token for question in prompt.questions for token in (*question.ids, question.answer)]
    return [*prompt.prefix_ids[1:], *asked, *asked]


def main() -> None:
    """Draw the prompts and write the file; it reads back as the same tokens."""
    _, tokenizer = load_model(str(MODEL))
    text = (MODEL / "calibration_text.txt").read_text(encoding="utf-8")
    _, filler = begin_and_text(tokenizer, text)
    task = RetrievalTask(Vocabulary.load(MODEL), filler)
    ids: list[int] = []
    # Seeds beyond those that ``cachegen eval`` calibrates its peers on.
    for seed in range(CALIBRATION_SEED + 1000, CALIBRATION_SEED + 1000 + PROMPTS):
        ids += with_answers(task.sample(seed, PREFIX_TOKENS, facts=FACTS))
    content = task.render(ids)
    assert begin_and_text(tokenizer, content)[1] == ids, "the text reads back as other tokens"
    (MODEL / "calibration_prompts.txt").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
