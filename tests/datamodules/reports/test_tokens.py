import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from common.errors import DataError
from datamodules.reports.tokens import SPECIAL, ReportTokenizer, load_tokenizer, train_tokenizer

TEXTS = ["Cardiomegaly with 12 mm effusion, left.", "No effusion. The heart is not enlarged.", "Café au lait"] * 5


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_special_tokens_come_first_and_words_come_back(kind):
    tokenizer = train_tokenizer(TEXTS, 400, kind)
    assert [tokenizer.token(i) for i in range(4)] == list(SPECIAL)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.mask_id) == (0, 1, 2, 3)
    encoded = tokenizer.encode("No effusion", 20)
    assert encoded.ids[0] == tokenizer.cls_id
    assert not encoded.maskable[0]
    assert tokenizer.unk_id not in encoded.ids.tolist()
    text = tokenizer.backend.decode(encoded.ids[1:].tolist()).strip()
    assert text.lower() == "no effusion"


def test_wordpiece_lowers_strips_accents_and_sets_digits_and_marks_apart():
    tokenizer = train_tokenizer(TEXTS, 400)
    tokens = [tokenizer.token(i) for i in tokenizer.encode("CAFÉ 12mm.", 20).ids.tolist()]
    joined = " ".join(tokens).replace(" ##", "")
    assert joined == "[CLS] cafe 12 mm ."


def test_starts_mark_the_words():
    tokenizer = train_tokenizer(["aa ab ba bb"] * 3, 9)
    encoded = tokenizer.encode("abab ab", 20)
    tokens = [tokenizer.token(i) for i in encoded.ids.tolist()]
    assert encoded.starts.tolist() == [not token.startswith("##") for token in tokens]
    assert not encoded.starts.all()


def words_of(tokenizer, text):
    """Return the pieces of a text that begin at word starts, as written."""
    encoded = tokenizer.encode(text, 10**3)
    firsts = [index for index, start in enumerate(encoded.starts.tolist()) if start and index]
    ids = encoded.ids.tolist()
    pieces = [ids[i:j] for i, j in zip(firsts, [*firsts[1:], len(ids)], strict=True)]
    return ["".join(map(tokenizer.token, piece)).replace("##", "").removeprefix("Ġ") for piece in pieces]


@pytest.mark.parametrize(("kind", "words"), [
    ("bpe", ["a", "T2-weighted", "x-ray", "of", "the", "patient's", "lung"]),
    ("wordpiece", ["a", "t", "2", "-", "weighted", "x", "-", "ray", "of", "the", "patient", "'", "s", "lung"]),
])  # fmt: skip
def test_words_are_those_between_blanks_or_those_of_the_wordpiece(kind, words):
    """Specification 2.3: in byte-level tokens a word begins at the blank marker or with the first token."""
    text = "a T2-weighted x-ray of the patient's lung"
    for size in (300, 400):
        assert words_of(train_tokenizer([*TEXTS, text, text], size, kind), text) == words


def test_the_first_token_begins_a_word_without_a_blank_before_it():
    bare = train_tokenizer(TEXTS, 300, "bpe").backend
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert words_of(ReportTokenizer(bare), "x-ray of T2") == ["x-ray", "of", "T2"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_special_tokens_in_a_text_are_text(kind):
    tokenizer = train_tokenizer([*TEXTS, "[MASK] lung [CLS] [PAD]"], 400, kind)
    encoded = tokenizer.encode("[MASK] lung [CLS]", 40)
    ids = encoded.ids.tolist()
    assert tokenizer.mask_id not in ids
    assert ids.count(tokenizer.cls_id) == 1
    assert ids[0] == tokenizer.cls_id
    assert encoded.maskable[1:].all()
    assert tokenizer.backend.decode(ids[1:]).lower().replace(" ", "") == "[mask]lung[cls]"


def test_a_long_text_loses_its_end():
    tokenizer = train_tokenizer(TEXTS, 400)
    long, short = tokenizer.encode(TEXTS[0], 4), tokenizer.encode(TEXTS[0], 60)
    assert long.cut
    assert not short.cut
    assert long.ids.tolist() == short.ids[:4].tolist()


def test_an_empty_text_is_the_class_token():
    assert train_tokenizer(TEXTS, 400).encode("", 20).ids.tolist() == [2]


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 90), ("bpe", 300)])
def test_training_again_gives_the_same_vocabulary(kind, size):
    assert len({train_tokenizer(TEXTS, size, kind).fingerprint for _ in range(8)}) == 1


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text in the training split"):
        train_tokenizer([""], 100)
    with pytest.raises(DataError, match="vocab_size"):
        train_tokenizer(TEXTS, 4)
    with pytest.raises(DataError, match=r"has no \[PAD\]"):
        ReportTokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere.json")


@pytest.mark.real_data
def test_a_vocabulary_of_transformers(real_data):
    tokenizer = load_tokenizer(real_data("bert_vocab"))
    assert tokenizer.vocab_size == 30522
    assert tokenizer.token(tokenizer.cls_id) == "[CLS]"
    assert tokenizer.unk_id not in tokenizer.encode("pleural effusion", 9).ids.tolist()


@pytest.mark.real_data
def test_open_i(real_data):
    """The bounds of the specification: median 42 or 43 tokens, nothing unknown to a vocabulary of its own."""
    from datamodules.reports.datamodule import ImageTextDataModule, ReportImageConfig

    data = ImageTextDataModule(str(real_data("openi_reports")), image=ReportImageConfig(size=(32, 32)))
    texts = [data.text_of(sample) for part in (data.index(), data.splits)[1].values() for sample in part]
    assert sum(not text for text in texts) == 28
    lengths = sorted(len(data.tokenizer.encode(text, 10**6).ids) for text in texts if text)
    assert 40 <= lengths[len(lengths) // 2] <= 46
    unknown = [text for text in data.training_texts() if 1 in data.tokenizer.encode(text, 10**6).ids.tolist()]
    assert not unknown
