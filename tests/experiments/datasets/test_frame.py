"""Frames: numbers and texts come out, code never runs."""

import lzma
import pickle

import pytest

from common.datasets.frame import read_frame
from mpjax.errors import ConfigError
from tests.assets import asset


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def write(path, value):
    path.write_bytes(lzma.compress(pickle.dumps(value)))
    return path


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = write(tmp_path / "evil", Evil())
    with pytest.raises(ConfigError, match="it names builtins.print") as caught:
        read_frame(path)
    assert len(str(caught.value).splitlines()) == 1 and not capsys.readouterr().out
    pickle.loads(lzma.decompress(path.read_bytes()))
    assert "never" in capsys.readouterr().out, "plain pickle would have run it"


@pytest.mark.parametrize("how", ["absent", "no xz", "cut", "a list", "too deep"])
def test_what_is_no_frame_is_one_line(tmp_path, how):
    path = tmp_path / "file"
    if how == "no xz":
        path.write_bytes(b"not compressed")
    elif how == "cut":
        path.write_bytes(write(path, {"a": 1}).read_bytes()[:-20])
    elif how == "a list":
        write(path, [1, 2])
    elif how == "too deep":
        path.write_bytes(lzma.compress(b"\x80\x04" + b"(" * 10 + b"."))
    with pytest.raises(ConfigError, match="file: (cannot be read|no pickled table)"):
        read_frame(path)


def test_the_reviews_are_what_their_package_says():
    frame = read_frame(asset("reviews") / "testing_data.pkl.compress")
    assert list(frame) == ["rownames", "product", "review", "score"]
    assert {len(column) for column in frame.values()} == {1000}
    assert (frame["score"] == "great").sum() == 658
    assert frame["review"][0].startswith("These are the best tasting gummy fruits")
