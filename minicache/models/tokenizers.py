"""The files of a model's tokenizer: as transformers writes it, and as they are; proven to turn text into the same ids."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minicache.data.tokenizer_bounds import require_bounded_files
from minicache.data.tokenizer_files import SOURCE, copy_to_policy, copy_tokenizer, is_tokenizer_file, tokenizer_files
from minicache.data.tokenizers import reading
from minicache.disk import scratch_folder
from minicache.errors import ModelError
from minicache.failures import panics_as_errors, system_error, writing
from minicache.models.huggingface import from_pretrained, without_cache_of_tiktoken
from minicache.text import one_line

log = logging.getLogger(__name__)

Ids = Callable[[str, bool], list[int] | None]
# Text of every script and of what tokenizers treat in ways of their own.
TEXTS = (
    "The quick brown fox can't jump over 13 lazy dogs; it's 3.14 or 1,000,000.",
    "Größe, naïve café, El Niño, Łódź, İstanbul, Việt Nam",
    "敏捷的棕色狐狸跳过了懒狗。龍與鳳，测试！",
    "素早い茶色の狐がのろまな犬を飛び越える。カタカナ",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "השועל החום המהיר קופץ מעל הכלב העצלן",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है",
    "দ্রুত বাদামী শিয়াল অলস কুকুরের উপর লাফ দেয়",
    "வேகமான பழுப்பு நரி சோம்பேறி நாயின் மீது குதிக்கிறது",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ",
    "Быстрая коричневая лиса. Γρήγορη καφέ αλεπού. Արագ. სწრაფი. ፈጣን",
    "👩‍👩‍👧‍👦 🎉 🇩🇪 👍🏽 ☃️ 𝕬𝖇 𒀀",
    "def f(x: int) -> str:\n\treturn f'{x:>3}'  # comment\n\n\nif __name__ == \"__main__\":\n    f(1)\r\n",
    "<div class='a'>&amp;</div> https://example.org/a?b=c#d user@example.org {\"k\": [1, null]}",
    "a  b   c    d\t\te \n f\n\n g",
    " leading and trailing  ",
    "\n",
    " ",
    "",
    "é e\u0301 ﬁ Å ① ½ ﷺ \u00a0\u2009\u3000x",
    "\x00\x01\x1b\x7f\x85 \u200b\u200d\u202e\ufeff\ufffd\ufff9 \U000e0041",
    "a" * 70 + "!" * 20 + "1234567890" * 3,
    "<s>x</s> <unk> [INST] <|im_start|>user<|im_end|> <|endoftext|> ▁ Ġ ##",
)
MOST_SPECIAL = 64  # of a tokenizer's own special tokens, which may be a thousand


def save_tokenizer(source: str, directory: Path, trust_remote_code: bool, model_type: str = "") -> None:
    """Write the files of the tokenizer at `source`: as transformers writes it and, in `source/`, as they are (but of a .gguf).

    model_type: that of the policy's config, by which transformers may choose the tokenizer's class.

    Raises:
        ModelError: there is none, it is beyond bounds, transformers cannot load or convert it, or what is written gives other ids.
    """
    files = None
    if Path(source).suffix != ".gguf":
        # what is missing is told below, by transformers
        with suppress(ModelError):
            files = _files_at(source)
    if files:
        require_bounded_files(files)
    try:
        tokenizer = _opened(source, trust_remote_code)
    except ModelError as error:
        if missing := _missing_library(source):
            raise missing from error
        raise
    with _writing(directory):
        tokenizer.save_pretrained(directory)
    if not (directory / "tokenizer.json").exists():
        _convert(tokenizer, directory, source)
    texts = [*TEXTS, *(f"a{token}b {token} c" for token in _own_tokens(tokenizer))]
    # once for all comparisons: a large vocabulary takes seconds
    expected = _ids_of(tokenizer)
    _require_same(texts, expected, _ids_of_file(directory), source)
    if Path(source).suffix == ".gguf":
        return
    files = files or _files_at(source)
    with _writing(directory):
        copy_tokenizer(files, directory / SOURCE)
    differs = _difference_of_file(directory / SOURCE, texts, expected)
    if differs is None:
        differs = _reloaded_difference(directory, texts, tokenizer, expected, trust_remote_code, model_type)
    if differs is not None:
        log.info("%s: transformers reads its files otherwise beside a %s model (%s)", source, model_type, differs)
        shutil.rmtree(directory / SOURCE)
        differs = _reloaded_difference(directory, texts, tokenizer, expected, trust_remote_code, model_type)
    if differs is not None:
        raise ModelError(
            f"{source}: the tokenizer would not be the same beside the policy: {differs}; name one that is, by --tokenizer"
        )


def _opened(source: str, trust_remote_code: bool) -> Any:
    """The tokenizer, by the tokenizers library: with mistral-common installed, transformers would read a tekken.json by that.

    Raises:
        ModelError: there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    # earlier transformers would take it for a setting of the tokenizer
    knows = hasattr(tokenization_auto, "_use_mistral_format")
    return from_pretrained(AutoTokenizer, source, trust_remote_code, **({"mistral_format": False} if knows else {}))


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """As `minicache.failures.writing`; the library of tokenizers raises an Exception without a number."""
    with writing(directory):
        try:
            with panics_as_errors():
                yield
        except Exception as error:
            raise system_error(error, directory.parent) from error


def _files_at(source: str) -> Path:
    """The directory of a tokenizer's files: that of `source`, or of the snapshot of a hub id, which is downloaded.

    Raises:
        ModelError: they cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import HfApi, snapshot_download

    names, problem = None, None
    # huggingface_hub raises errors of three HTTP libraries
    try:
        listed = HfApi().list_repo_files(source)
    except Exception as error:
        log.info(
            "%s: all that is in the hub's cache, because its files cannot be listed: %s", source, one_line(error, 200)
        )
        problem = error
    else:
        names = [name for name in listed if is_tokenizer_file(name)]
    try:
        return Path(snapshot_download(source, allow_patterns=names, local_files_only=names is None))
    except Exception as error:
        problem = problem or error
        line = one_line(problem, 200)
        raise ModelError(f"{source}: its tokenizer's files cannot be downloaded: {line}") from problem


def _missing_library(source: str) -> ModelError | None:
    """The error that names the extra, if a tokenizer without tokenizer.json needs a library to convert it; else None."""
    with suppress(ModelError):
        files = _files_at(source)
        names = tokenizer_files(files)
        vocabulary = next((name for name in names if ".model" in name or name.endswith(".tiktoken")), None)
        if "tokenizer.json" in names or vocabulary is None:
            return None
        with (files / vocabulary).open("rb") as stream:
            is_tiktoken = re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", stream.read(4096))
        try:
            if is_tiktoken:
                import tiktoken  # noqa: F401
            else:
                import sentencepiece.sentencepiece_model_pb2  # noqa: F401
        # protobuf raises errors of its own where its version does not fit
        except Exception as error:
            kind = "tiktoken" if is_tiktoken else "SentencePiece"
            line = one_line(error, 200)
            return ModelError(
                f"{source}: converting its {kind} vocabulary needs more packages: pip install 'minidpo[tokenizers]' ({line})"
            )
    return None


def _convert(tokenizer: Any, directory: Path, source: str) -> None:
    """Write tokenizer.json of a tokenizer in Python, if transformers knows how."""
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        with panics_as_errors(), without_cache_of_tiktoken():
            converted = convert_slow_tokenizer(tokenizer)
    # it raises anything on a class that it does not know
    except Exception as error:
        raise ModelError(
            f"{source}: the tokenizer has no fast (tokenizers library) version, which minidpo needs"
        ) from error
    with _writing(directory):
        converted.save(str(directory / "tokenizer.json"))


def _own_tokens(tokenizer: Any) -> list[str]:
    tokens = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    return list(tokens)[:MOST_SPECIAL]


def _ids_of(tokenizer: Any) -> Ids:
    @cache
    def ids(text: str, special: bool) -> list[int] | None:
        # a tokenizer without an unknown token raises at a character that it lacks, and a pattern may panic
        with suppress(Exception), panics_as_errors():
            return list(tokenizer(text, add_special_tokens=special)["input_ids"])
        return None

    return ids


def _ids_of_file(directory: Path) -> Ids:
    """Of tokenizer.json alone, as the data is encoded. Raises ModelError: it cannot be read."""
    file = directory / "tokenizer.json"
    with reading(file):
        backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()

    def ids(text: str, special: bool) -> list[int] | None:
        with suppress(Exception), panics_as_errors():
            return list(backend.encode(text, add_special_tokens=special).ids)
        return None

    return ids


def _difference(texts: list[str], expected: Ids, found: Ids, special: tuple[bool, ...]) -> str | None:
    """What two tokenizers make of the first text that they encode differently, as a clause; None: they agree on all."""
    for text in texts:
        for add_special in special:
            wanted, came = expected(text, add_special), found(text, add_special)
            if wanted != came:
                pairs = zip(wanted or [], came or [], strict=False)
                alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                return (
                    f"{text[:60]!r} becomes, from its token {alike + 1} on, {_short(came, alike)}, where the source gives "
                    f"{_short(wanted, alike)}"
                )
    return None


def _short(ids: list[int] | None, start: int) -> str:
    """A few ids from index `start` on."""
    return "no ids" if ids is None else f"{ids[start : start + 8]}"[:-1] + (", …]" if len(ids) > start + 8 else "]")


def _require_same(texts: list[str], expected: Ids, found: Ids, source: str) -> None:
    """Raises ModelError: the tokenizers library alone encodes a text otherwise than transformers does."""
    differs = _difference(texts, expected, found, special=(False,))
    if differs is not None:
        raise ModelError(
            f"{source}: tokenizer.json alone does not do what the tokenizer does in transformers, which minidpo needs: {differs}"
        )


def _difference_of_file(files: Path, texts: list[str], expected: Ids) -> str | None:
    """How the source's tokenizer.json by itself differs from the tokenizer; None: it does not, or is not there.

    The class that transformers chooses by a model's config may change what that file says (Qwen2's splits digits).
    """
    if not (files / "tokenizer.json").exists():
        return None
    return _difference(texts, expected, _ids_of_file(files), special=(False,))


def _reloaded_difference(
    directory: Path, texts: list[str], tokenizer: Any, expected: Ids, trust_remote_code: bool, model_type: str
) -> str | None:
    """How a policy's tokenizer, loaded by transformers, differs from the source's; None: it does not.

    expected: the ids that the source's tokenizer gives.
    """
    with scratch_folder("tokenizer") as place:
        with writing(place):
            copy_to_policy(directory, place)
            if model_type:
                (place / "config.json").write_text(
                    json.dumps({"model_type": model_type}), encoding="utf-8", newline="\n"
                )
        try:
            reloaded = _opened(str(place), trust_remote_code)
        except ModelError as error:
            return str(error).removeprefix(f"{place}: ")
    if reloaded.special_tokens_map != tokenizer.special_tokens_map:
        return (
            f"its special tokens are {reloaded.special_tokens_map}, where the source has {tokenizer.special_tokens_map}"
        )
    return _difference(texts, expected, _ids_of(reloaded), special=(False, True))
