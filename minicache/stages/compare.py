"""Reference and policy answer the same prompts: side by side on the screen, as JSON lines, or as a page for blind votes."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minicache.data.arguments import parse_arguments
from minicache.data.template import require_read
from minicache.data.tokenizers import ChatTokenizer
from minicache.disk import check_writable, written_whole
from minicache.errors import ConfigError
from minicache.intake.prompts import Prompt, read_prompts
from minicache.json_lines import to_json_lines
from minicache.judge.judging import Judge
from minicache.judge.question import Answered
from minicache.judge.rate import WinRate
from minicache.models import load_model
from minicache.models.adapter_places import tokenizer_place
from minicache.models.answering import Answer, Sampling, answer_all, require_fit
from minicache.options.others import CompareConfig
from minicache.pages.compare import Answers, page
from minicache.processes.world import World
from minicache.trackers import Tracker
from minicache.training.run_directory import RECORD, reading, run_behind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """The answers of both models to every prompt. judge: what a judge says of them, None without one."""

    answers: list[Answers]
    judge: WinRate | None = None


def compare(config: CompareConfig, world: World, tracker: Tracker) -> Compared:
    """The answers of both models to every prompt, also written to `config.jsonl` and `config.html` if these are named.

    Raises:
        MinicacheError: a model or the prompts cannot be read, the models do not fit, the reference is not known, or the judge
            cannot be asked: then the answers are written without its verdicts.
    """
    verdicts = verdicts_file(config)
    for file in filter(None, (config.jsonl, config.html, verdicts)):
        check_writable(file)
    judge = Judge(config.judging, verdicts, tracker.note) if verdicts else None
    with reading(config.policy) as policy:
        first = (config.reference, "") if config.reference else _reference_of(config.policy)
        tokenizer = tokenizer_of(config, policy)
        prompts = read_prompts(config, tokenizer, tracker.note)
        before, after = (_ask(model, tokenizer, prompts, config, world, tracker) for model in (first, (policy, "")))
    answers = [_side_by_side(*each) for each in zip(prompts, before, after, strict=True)]
    _note_cut(answers, config, tracker)
    names = {"reference": first[0], "policy": config.policy}
    # before the judge is asked, which may fail
    _write(answers, config, names)
    if judge is None:
        return Compared(answers)
    rate = judge.judge(_answered(answers), lambda texts: _tokens(tokenizer, texts), tracker)
    if rate:
        _write(answers, config, names, rate)
    return Compared(answers, rate)


def verdicts_file(config: CompareConfig) -> Path | None:
    """Where verdicts are kept; None without a judge."""
    if not config.judging.judge or config.judging.verdicts:
        return config.judging.verdicts
    if beside := config.jsonl or config.html:
        return beside.with_name(f"{beside.stem}.verdicts.jsonl")
    run = Path(config.policy)
    return (run if (run / RECORD).is_file() else Path()) / "verdicts.jsonl"


def tokenizer_of(config: CompareConfig, policy: str) -> ChatTokenizer:
    """The policy's tokenizer; its template gets what the run's did, unless other values are given."""
    behind = run_behind(config.policy)
    tokenizer = ChatTokenizer.load(Path(tokenizer_place(policy)))
    given = parse_arguments(config.template_arg)
    require_read(tokenizer.chat, config.date, given)
    date = config.date or (behind and behind.date) or ""
    return replace(tokenizer, date=date, arguments=given or (behind and behind.template_args) or "")


def _reference_of(run: str) -> tuple[str, str]:
    """The model that the run of this policy started from, and its quantization. Raises ConfigError: it is not known."""
    behind = run_behind(run)
    if behind is None:
        raise ConfigError(f"{run} is no run directory that says what it started from; add --reference MODEL")
    return behind.started_from, behind.quantization or ""


def _ask(
    named: tuple[str, str],
    tokenizer: ChatTokenizer,
    prompts: list[Prompt],
    config: CompareConfig,
    world: World,
    tracker: Tracker,
) -> list[Answer]:
    """The answers of one model, given by name and quantization. It is freed before the other one is loaded."""
    source, started = named[0], time.monotonic()
    ids = [prompt.ids for prompt in prompts]
    tracker.begin(f"loading {source}", None)
    model = load_model(source, config.trust_remote_code, named[1]).model
    require_fit(source, model, ids, config.max_new_tokens)
    tracker.begin(f"answering as {source}", len(prompts))
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    answers = answer_all(model.to(world.device), tokenizer, ids, sampling, tracker.advance)
    log.debug("%s answered %d prompts: %.1f s", source, len(ids), time.monotonic() - started)
    return answers


def _side_by_side(prompt: Prompt, before: Answer, after: Answer) -> Answers:
    return Answers(
        prompt=prompt.text,
        messages=[turn.message for turn in prompt.turns],
        reference=before.text,
        policy=after.text,
        reference_cut=before.is_cut,
        policy_cut=after.is_cut,
    )


def _note_cut(answers: list[Answers], config: CompareConfig, tracker: Tracker) -> None:
    """Note how many answers reached the limit of tokens."""
    cut = sum(item.reference_cut + item.policy_cut for item in answers)
    if cut:
        tracker.note(f"{cut} of {2 * len(answers)} answers were cut at --max-new-tokens {config.max_new_tokens}")


def _answered(answers: list[Answers]) -> list[Answered]:
    """What a judge reads of the answers."""
    return [Answered(each.prompt, each.reference, each.policy, each.reference_cut, each.policy_cut) for each in answers]


def _tokens(tokenizer: ChatTokenizer, texts: Sequence[str]) -> int:
    return sum(len(each.ids) for each in tokenizer.backend.encode_batch(list(texts)))


def _write(answers: list[Answers], config: CompareConfig, names: dict[str, str], judge: WinRate | None = None) -> None:
    """Write the files asked for. names: those of the two models, by "reference" and "policy"."""
    shown = ("system", "max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    settings = {name: getattr(config, name) for name in shown}
    if config.jsonl:
        rows = [{**asdict(item), "models": names, "settings": settings} for item in answers]
        for row, judged in zip(rows, judge.prompts if judge else (), strict=False):
            row["judge"] = {"model": judge and judge.model, **asdict(judged)}
        with written_whole(config.jsonl) as draft:
            draft.write_text(to_json_lines(rows), encoding="utf-8", newline="\n")
    if config.html:
        with written_whole(config.html) as draft:
            draft.write_text(page(answers, names, settings, config.seed, judge), encoding="utf-8", newline="\n")
