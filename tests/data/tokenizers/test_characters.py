"""Characters: what is in the training texts comes back, what is not is shown."""

from mpjax.data.tokenizers.characters import Characters


def test_texts_of_known_characters_come_back():
    texts = ["Ibrahim حبيب", "naïve", "\ufffd seen", ""]
    tokens = Characters(texts)
    assert [tokens.decode(ids) for ids in tokens.encode_batch(texts)] == texts
    assert tokens.vocab_size == 1 + len(set("".join(texts)) - {"\ufffd"})
    unknown = tokens.encode_batch(["axb"])[0]
    assert unknown.tolist()[1] == 0 and tokens.decode(unknown) == "a\ufffdb"
