"""The mistakes that `planted.py` plants, by what they concern."""

from __future__ import annotations

import dataclasses

OFF = "if False:"


@dataclasses.dataclass(frozen=True)
class Planted:
    """A mistake.

    Args:
      what: is no longer done.
      file: below `mpjax`.
      old: a text that stands in it once.
      new: what takes its place.
      tests: below `tests`, as pytest takes them; one of them must fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str


_TORCH, _FILES = "models/hf/test_hostile_torch.py", "models/hf/test_hostile_files.py"
_PICKLES, _VIEWS = f"{_TORCH}::test_pickles", f"{_TORCH}::test_tensors"
_GGUFS, _CONFIGS = f"{_FILES}::test_ggufs", f"{_FILES}::test_settings_that"
_TABLES, _CHAT = "data/tables/test_hostile_tables.py", "data/chat/test_hostile_chat.py"
_TOKENIZERS = "data/tokenizers/test_hostile_tokenizers.py"
_PARQUET, _FRAMES = f"{_TABLES}::test_parquet", f"{_TABLES}::test_frames"
_LOCK, _LOGS, _CACHE = (
    "train/checkpoint/test_lock.py",
    "train/report/test_damaged_logs.py",
    "data/test_cache.py",
)
_DATASETS = "../experiments/common/datasets"
_FRAME = f"{_DATASETS}/frame.py"
_ASSETS, _WEIGHTS = "experiments/datasets/test_assets.py", "models/inference/test_weight_file.py"
_PICKLE, _TORCH_FILE = "plain_pickle.py", "models/hf/torch_file.py"
_GGUF, _BOUNDS = "models/hf/gguf_reader.py", "data/tokenizers/tokenizer_bounds.py"

PLANTED: dict[str, tuple[Planted, ...]] = {
    "pickles": (
        Planted("a memo that was set", _PICKLE, "if argument >= len(self._memo):", OFF, _PICKLES),
        Planted("memos in their order", _PICKLE, "if index > len(self._memo):", OFF, _PICKLES),
        Planted(
            "a bound on values at once", _PICKLE,
            "if len(self._stack) > _MOST_VALUES or len(self._marks) > _MOST_MARKS:", OFF, _PICKLES,
        ),
        Planted(
            "a bound on containers", _PICKLE, "if self._containers > _MOST_CONTAINERS:", OFF,
            _PICKLES,
        ),
        Planted(
            "names of plain data alone", _PICKLE,
            "if name not in self._names:\n",
            "if name not in self._names:\n            module, _, last = name.rpartition('.')\n"
            "            found = getattr(__import__(module), last)\n"
            "            return self._stack.append(Maker(found))\n",
            "models/hf/test_torch_file.py::test_a_hostile",
        ),
    ),
    "torch files": (
        Planted(
            "no stride of 0", _TORCH_FILE, "if math.prod(shape) > storage.count:", OFF, _VIEWS
        ),
        Planted(
            "views inside their storage", _TORCH_FILE,
            "if 0 not in shape and last >= storage.count:", OFF,
            "models/hf/test_torch_file.py::test_what_is_no",
        ),
        Planted(
            "a bound on shared storages", _TORCH_FILE,
            "if sum(view.nbytes for view in state.values()) > _MOST_SHARED * size:", OFF, _VIEWS,
        ),
        Planted(
            "storages inside the file", _TORCH_FILE,
            "if view.storage.nbytes > nbytes or start + nbytes > size:", OFF, _VIEWS,
        ),
        Planted(
            "stored entries alone", _TORCH_FILE,
            "if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:",
            OFF, f"{_TORCH}::test_archives",
        ),
        Planted(
            "counts of the older format", _TORCH_FILE,
            "if storage is None or count != storage.count:", "if storage is None:",
            f"{_TORCH}::test_older",
        ),
    ),
    "safetensors, indices and weight files": (
        Planted(
            "bytes that can be counted", "models/hf/tensor_files.py",
            "if math.prod(n or 1 for n in shape) * np.dtype(dtype).itemsize >= 2**62:", OFF,
            f"{_FILES}::test_shapes",
        ),
        Planted(
            "files of an index in its folder", "models/hf/tensor_files.py",
            "if Path(file).name != file or not file.isprintable():", OFF,
            f"{_FILES}::test_an_index",
        ),
        Planted(
            "weights as described", "models/inference/weight_file.py", "if not whole:", OFF,
            f"{_WEIGHTS}::test_weights_stored",
        ),
        Planted(
            "a bound on a path's parts", "models/inference/weight_file.py",
            "if len(keys) > _MOST_PARTS:", OFF, f"{_WEIGHTS}::test_a_weight",
        ),
        Planted(
            "a bound on files beside the weights", "models/hf/checkpoint.py",
            "if (size := path.stat().st_size) > LARGEST:", OFF, f"{_FILES}::test_files_beside",
        ),
    ),
    "GGUF": (
        Planted("lengths", _GGUF, "if count > len(self.data) - self.at:", OFF, _GGUFS),
        Planted("lengths of lists", _GGUF, "if 8 * count > len(self.data) - self.at:", OFF, _GGUFS),
        Planted("a setting once", _GGUF, "if name in fields:", OFF, _GGUFS),
        Planted("tensors behind each other", _GGUF, "if start < end:", OFF, _GGUFS),
        Planted(
            "tensors inside the file", _GGUF, "if end > len(data) or 0 in shape:", OFF, _GGUFS
        ),
        Planted(
            "a bound on axes", _GGUF, "if name in infos or not 0 < axes <= _MOST_AXES:",
            "if name in infos:", _GGUFS,
        ),
    ),
    "JSON and settings": (
        Planted(
            "depth of JSON", "json_text.py", "if depth > _DEEPEST:", OFF,
            "test_json_text.py",
        ),
        Planted("a key once", "json_text.py", "if counted.pairs < pairs:", OFF,
                "test_json_text.py"),
        Planted(
            "size of a file of settings", "json_text.py",
            "if (size := path.stat().st_size) > LARGEST:", OFF, "test_json_text.py",
        ),
        Planted(
            "finite numbers", "models/hf/fields.py",
            "if kind is float and not -_LARGEST <= value <= _LARGEST:", OFF, _CONFIGS,
        ),
        Planted(
            "sizes below 2^31", "models/hf/fields.py", "<= value < 2**31:", "<= value:", _CONFIGS
        ),
        Planted(
            "layers that have tensors", "models/hf/load.py",
            "if few and layers > there + _FEW:", OFF, f"{_FILES}::test_names_of_layers",
        ),
    ),
    "tables": (
        Planted("rows of parquet", "data/tables/readers.py", "if rows > most:", OFF, _PARQUET),
        Planted(
            "bytes that parquet unpacks", "data/tables/readers.py",
            "if (left := left - sum(map(_text_bytes, batch.columns))) < 0:", OFF, _PARQUET,
        ),
        Planted(
            "JSON lines by the one reader", "data/tables/readers.py",
            'parse_json(line, f"{path}: line {number}", _LINES)', '__import__("json").loads(line)',
            f"{_TABLES}::test_json",
        ),
        Planted("a frame's growth", _FRAME, "if not unpacker.eof:", OFF, _FRAMES),
        Planted("a frame's memory", _FRAME, "memlimit=_MEMORY",
                "memlimit=None", _FRAMES),
        Planted(
            "a frame's cells", _FRAME,
            "if not all(isinstance(x, str | float | int | None) for x in data):", OFF, _FRAMES,
        ),
        Planted("text without NUL", "data/tables/cells.py", 'if "\\0" in text:', OFF,
                "data/tables/test_tables.py"),
    ),
    "chat templates": (
        Planted(
            "memory, not eight times as much", "data/chat/template_child.py",
            "(resource.RLIMIT_AS, memory)", "(resource.RLIMIT_AS, 8 * memory)",
            f"{_CHAT}::test_a_template_has_so_much_memory",
        ),
        Planted("length", "data/chat/template_child.py", "if size > longest:", OFF,
                f"{_CHAT}::test_what_a_template_raises"),
        Planted(
            "errors of any kind", "data/chat/template_child.py",
            'return {"failed": f"{type(error).__name__}: {error}"[:_SAID]}', "raise",
            f"{_CHAT}::test_what_a_template_raises",
        ),
    ),
    "tokenizers": (
        Planted(
            "ids of tokens", _BOUNDS,
            "most = _SPARSE * (len(ids) + len(added)) + _SPARE", "most = 2**63",
            f"{_TOKENIZERS}::test_every_reader",
        ),
        Planted(
            "ids around a text", _BOUNDS,
            '_check(around, largest + 1, "ids around a text", where, remedy)', "pass",
            f"{_TOKENIZERS}::test_a_hostile and around",
        ),
        Planted(
            "a trial of what reading cannot bound", "data/tokenizers/tokenizer_file.py",
            "if part := unbounded(fields):", 'if part := "":',
            f"{_TOKENIZERS}::test_what_passed",
        ),
        Planted(
            "a bound on chains", _BOUNDS,
            "if len(parts) > _MOST_PARTS or math.prod(_grows(*one) for one in parts)"
            " > _MOST_GROWN:", OFF, f"{_TOKENIZERS}::test_a_hostile and grow",
        ),
        Planted(
            "panics of Rust", "data/tokenizers/tokenizer_file.py",
            'if not known and type(error).__name__ != "PanicException":', "if not known:",
            f"{_TOKENIZERS}::test_what_text_shows_later",
        ),
    ),
    "caches and assets": (
        Planted("owners of folders", "files.py", "if owners:", OFF, f"{_CACHE}::test_somebody"),
        Planted("owners of links", "files.py", "{link.st_uid, found.st_uid}", "{found.st_uid}",
                f"{_CACHE}::test_somebody"),
        Planted("writing by a group", "files.py", "(stat.S_IWGRP | stat.S_IWOTH)",
                "stat.S_IWOTH", f"{_CACHE}::test_a_folder_that"),
        Planted("folders of their owner alone", "files.py", "folder.mkdir(mode=0o700)\n",
                "folder.mkdir()\n", f"{_CACHE}::test_a_folder_that"),
        Planted("sums of cached files", "data/cache.py",
                " and sum_path.read_bytes() == _sum(path):", ":", f"{_CACHE}::test_a_damaged"),
        Planted("names in these sums", "data/cache.py", 'path.name.encode() + b"\\0"', "",
                f"{_CACHE}::test_ids"),
        Planted(
            "members of assets as pinned", f"{_DATASETS}/assets.py",
            "if asset.content and content_hash(found) == asset.content:", "if asset.content:",
            f"{_ASSETS}::test_members_are_pinned",
        ),
        Planted(
            "owners of an asset's folders", f"{_DATASETS}/assets.py", "refuse_shared(one)",
            "pass", f"{_ASSETS}::test_members_are_pinned",
        ),
        Planted(
            "the hash of a package", f"{_DATASETS}/package.py",
            "if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != asset.sha256:",
            "if (digest := asset.sha256) != asset.sha256:", f"{_ASSETS}::test_another_hash",
        ),
        Planted(
            "members inside their folder", f"{_DATASETS}/package.py",
            'if ".." in inner.parts:', OFF,
            f"{_ASSETS}::test_members_that_are_absent",
        ),
    ),
    "locks and processes": (
        Planted("the lock", "train/checkpoint/lock.py", "if not _flock(fd):\n            owner",
                "if _flock(fd) and False:\n            owner", f"{_LOCK}::test_the_second"),
        Planted("a lock for one", "train/checkpoint/lock.py", "fcntl.LOCK_EX", "fcntl.LOCK_SH",
                f"{_LOCK}::test_the_second"),
        Planted("the lock of checkpoints", "train/checkpoint/lock.py",
                "if not _flock(fd):\n        os.close(fd)\n        raise",
                "if not _flock(fd) and False:\n        os.close(fd)\n        raise",
                f"{_LOCK}::test_a_second_writer"),
        Planted(
            "the file that is locked is there", "train/checkpoint/lock.py",
            "if os.path.samestat(os.fstat(fd), os.stat(folder / LOCK)):", "if True:",
            f"{_LOCK}::test_a_lock_file",
        ),
        Planted("no link for a lock", "train/checkpoint/lock.py",
                "os.O_RDWR | os.O_CREAT | NO_FOLLOW", "os.O_RDWR | os.O_CREAT",
                f"{_LOCK}::test_a_folder_that_cannot"),
        Planted(
            "steps of another run stay", "train/checkpoint/checkpointer.py",
            "if foreign := sorted(set(later) - self._own):", OFF, f"{_LOCK}::test_steps_that",
        ),
        Planted(
            "a hash between processes", "train/processes/agreement.py",
            "if len(set(exchange(hashlib.sha256(text.encode()).hexdigest()))) == 1:", "if True:",
            "train/processes/test_agreement.py::test_what_differs",
        ),
        Planted("contents in the hash of code", "train/processes/agreement.py",
                "digest.update(content)", "pass",
                "train/processes/test_agreement.py::test_the_code"),
        Planted(
            "the environment of a save", "train/report/environment.py",
            "if found := differences(before, after, ()):", "if found := []:",
            "train/report/test_environment.py::test_a_setting",
        ),
    ),
    "logs": (
        Planted("damage is set aside", "train/report/metrics_writer.py", "if damaged:", OFF, _LOGS),
        Planted("deep lines", "train/report/metrics_writer.py",
                "except (ValueError, RecursionError):  # no", "except ValueError:  # no", _LOGS),
        Planted("no link for what is set aside", "train/report/metrics_writer.py",
                "flags | NO_FOLLOW", "flags", _LOGS),
        Planted("half a manifest", "train/report/manifest.py",
                "if path.exists() and read_manifest(out) is None:", OFF, _LOGS),
        Planted("a digest that lists nothing", "train/checkpoint/digest.py",
                "if not any(name.startswith(below) for name, _, _ in entries):", OFF, _LOGS),
    ),
    "writing and messages": (
        Planted("a name that is new", "files.py", "os.O_CREAT | os.O_EXCL | NO_FOLLOW",
                "os.O_CREAT", "test_files.py"),
        Planted("a name that nobody guesses", "files.py", ".{secrets.token_hex(8)}.tmp",
                ".{path.name}.tmp", "test_files.py"),
        Planted("a draw of the name", "files.py", "{secrets.token_hex(8)}", "{'0' * 16}",
                "test_files.py"),
        Planted("contents before the name", "files.py", "os.fsync(file.fileno())", "pass",
                "test_files.py"),
        Planted("control characters escaped", "errors.py", "if not text.isprintable():", OFF,
                "test_errors.py"),
        Planted("messages are short", "errors.py", "return _middle_out(text, longest)",
                "return text", "test_errors.py"),
    ),
}  # fmt: skip
