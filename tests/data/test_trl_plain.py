"""docs/trl.md's recipe for plain text: the template of the page gives TRL's ids and counts what TRL counts."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from minicache.data.columns import Reading
from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs
from minicache.data.tokenizers import ChatTokenizer
from tests.data.test_tokenizers import with_template
from tests.references.trl import plain_text_ids

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
ROWS = [
    {"prompt": "why the cat", "chosen": " on a mat", "rejected": " it rained"},
    {"prompt": "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n", "chosen": "a", "rejected": "b<|im_end|>"},
    {"prompt": "\n\nHuman: why\n\nAssistant:", "chosen": " the cat", "rejected": " not"},
    {"prompt": "why th", "chosen": "en", "rejected": " then"},
    {"prompt": "今天", "chosen": "天气 ", "rejected": "好"},
]


def recipe() -> str:
    (template,) = re.findall(r"```jinja\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(template)


@pytest.mark.parametrize("bos", [False, True])
def test_the_recipe_gives_trls_ids(tokenizer_dir: Path, tmp_path: Path, bos: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = with_template(tokenizer_dir, tmp_path, "{{ bos_token }}" * bos + recipe())
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if bos:
        number = backend.token_to_id("<|endoftext|>")
        backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", number)])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token=ours.special["eos_token"]
    )
    encoder = Encoder(ChatTokenizer.load(tmp_path), 500, special_text="allow")
    for row in ROWS:
        (pair,) = to_pairs(row, "f", 1, Reading("prompt"))
        encoded, expected = encoder.encode(pair).pair, plain_text_ids(theirs, row)
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            ids, mask = encoded.side(side)
            assert ids.tolist() == expected["prompt_ids"] + expected[name]
            # Where a token crosses the boundary, TRL drops the rest of the prompt, as docs/trl.md says.
            if expected["prompt_ids"] == theirs(text=row["prompt"])["input_ids"]:
                assert int(mask.sum()) == len(expected[name])
