import re
from types import SimpleNamespace

import pytest
import torch

from common.callbacks.text_restoration import TextRestoration, restored_row
from common.types import HiddenTokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "no", "large", "eff", "##usion", "<5", "left", "right", "a|b"]


def test_a_row_by_hand():
    tokens = ["[CLS]", "no", "[MASK]", "[MASK]", "eff", "##usion", "<5", "[MASK]"]
    truth, predicted = {2: "large", 3: "left", 7: "cm>"}, {2: "large", 3: "right", 7: "&"}
    shown, filled = restored_row(tokens, truth, predicted)
    assert shown == "[CLS] no **large** **left** effusion &lt;5 **cm&gt;**"
    assert filled == "[CLS] no 🟩**large** 🟥**right** (*left*) effusion &lt;5 🟥**&amp;** (*cm&gt;*)"


def test_a_hidden_word_is_one_word():
    """Whole words are hidden, so their pieces are read together."""
    tokens, truth = ["no", "[MASK]", "[MASK]"], {1: "eff", 2: "##usion"}
    assert restored_row(tokens, truth, {1: "eff", 2: "##usion"}) == ("no **effusion**", "no 🟩**effusion**")
    assert restored_row(tokens, truth, {1: "eff", 2: "left"})[1] == "no 🟥**eff left** (*effusion*)"


def test_a_word_hidden_in_part_falls_apart():
    shown, filled = restored_row(["eff", "[MASK]", "left"], {1: "##usion"}, {1: "##ace"})
    assert (shown, filled) == ("eff**usion** left", "eff🟥**ace** (*usion*) left")


def batch():
    """The first report is padded, the second has nothing hidden."""
    labels = torch.full((3, 4), -100)
    labels[0, 1], labels[2, 2], labels[2, 3] = 5, 9, 11
    return {
        "input_ids": torch.tensor([[2, 3, 8, 0], [2, 4, 6, 7], [2, 4, 3, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        "labels": labels,
        "hidden_index": torch.tensor([1, 10, 11]),
        "hidden_ids": torch.tensor([5, 9, 11]),
        "subject_id": ["s1", "s2", "<s3>"],
    }


def written(batches=1, num_samples=4, anonymise=False, rank_zero=True):
    """Return the text that one validation hands to a logger that shows text."""
    texts = []
    experiment = SimpleNamespace(add_text=lambda tag, text, global_step: texts.append((tag, text, global_step)))
    datamodule = SimpleNamespace(
        ledger=SimpleNamespace(anonymise=anonymise), tokenizer=SimpleNamespace(token=WORDS.__getitem__)
    )
    trainer = SimpleNamespace(datamodule=datamodule, is_global_zero=rank_zero, global_step=7,
                              loggers=[SimpleNamespace(experiment=experiment), SimpleNamespace()])  # fmt: skip
    guesses = torch.nn.functional.one_hot(torch.tensor([5, 10, 11]), len(WORDS)).float()
    module = SimpleNamespace(hidden_tokens=lambda batch: HiddenTokens(guesses, batch["hidden_ids"], None))
    callback = TextRestoration(num_samples)
    for _ in range(2):
        callback.on_validation_start(trainer, module)
        for _ in range(batches):
            callback.observe(trainer, module, None, batch())
        callback.on_validation_epoch_end(trainer, module)
    assert texts[0:1] == texts[1:2], "every validation shows the same"
    return texts[0] if texts else None


def test_reports_are_written_with_their_predictions():
    tag, text, step = written()
    assert (tag, step) == ("reconstruction/report", 7)
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[2] == "| s1 | [CLS] **large** &lt;5 | [CLS] 🟩**large** &lt;5 |"
    assert lines[3].startswith("| &lt;s3&gt; | [CLS] no **left** ")
    assert "🟥**right** (*left*) 🟩" in lines[3]


def test_a_report_stays_in_its_cell():
    """Unescaped bars would begin another column."""
    for line in written()[1].splitlines():
        assert len(re.findall(r"(?<!\\)\|", line)) == 4


@pytest.mark.parametrize(("num_samples", "rows"), [(1, 1), (3, 3), (9, 4)])
def test_no_more_than_wanted(num_samples, rows):
    assert len(written(batches=2, num_samples=num_samples)[1].splitlines()) == 2 + rows


def test_nothing_is_written_of_persons_who_must_stay_anonymous():
    assert written(anonymise=True) is None
    assert written(rank_zero=False) is None
