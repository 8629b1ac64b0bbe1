"""Pairs: no source on both sides."""

import pytest

from mpjax.data.pairs import load_pairs
from mpjax.errors import ConfigError


def test_all_targets_of_a_source_are_on_one_side(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"s{i % 100}\tt{i % 300}\n" for i in range(600)))
    train, test = load_pairs(str(path))
    assert len(train) + len(test) == 300 and test
    assert not {a for a, _ in train} & {a for a, _ in test}
    assert len(test) == 3 * len({a for a, _ in test})
    with pytest.raises(ConfigError, match="expected a file of source<TAB>target lines"):
        load_pairs("name")
    path.write_text("only one\n")
    with pytest.raises(ConfigError, match=r"line 1: 1 field\(s\); expected source<TAB>target"):
        load_pairs(str(path))
