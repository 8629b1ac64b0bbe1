"""The program that tries a foreign tokenizer, in a process of its own (see `tokenizer_file`).

It loads the text of a tokenizer.json, encodes a text and decodes ids, under limits that the kernel
keeps; then its answer, one line of JSON, says whether it could. It imports nothing of mpjax, whose
start takes longer.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

_LINES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? We've seen 1,234,567 of them.\n",
    "Zürich, naïve café, «Übung» — “quoted” … 3.14159 × 10⁻³ ½ ﬁ ﷺ İstanbul\r\n",
    "def f(x: int) -> int:\n\treturn x ** 2 + 10_000  # a_b.c[0] != {'key': \"value\"}\n\n",
    "敏捷的棕色狐狸。今日は いい天気です、ですか？ 안녕하세요 สวัสดี नमस्ते\n",
    "مرحبا بالعالم שלום Привет, мир!\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                                00000000000000000000 !!!!!!\n",
    "https://example.org/a/b?c=d&e=f#g <s>x</s> <|end|> [SEP] 👩‍👩‍👧 e\u0301 \u200b \ufffd\n",
)  # fmt: skip
TEXT = "".join(_LINES) * 110  # 64 kB


def tried(text: str) -> dict[str, str]:
    """Returns `fine`, or why not: `malformed` on loading, `failed` on use."""
    import tokenizers

    done = "malformed"
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        done = "failed"
        for special in (False, True):
            backend.encode_special_tokens = special
            ids = backend.encode(TEXT).ids
            backend.encode_batch([*_LINES, ""], add_special_tokens=False)
        backend.decode(ids[:10_000], skip_special_tokens=False)
        for i in range(32):
            backend.decode([i], skip_special_tokens=False)
        backend.decode(list(range(min(10_000, backend.get_vocab_size()))))
    except BaseException as error:  # a Rust panic is no Exception
        return {done: str(error)[:1000] or type(error).__name__}
    return {"fine": ""}


def main() -> None:
    """Reads the limits and the text, and answers."""
    start = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = start["path"]
    import tokenizers  # noqa: F401  (before the limits, which are for what it is given)

    text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    other = Path(__file__).parents[1] / "chat" / "template_child.py"
    limit = runpy.run_path(str(other))["limit"]
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit(start["seconds"], 4096 * pages + start["memory"])
    print(json.dumps(tried(text)), flush=True)


if __name__ == "__main__":
    main()
