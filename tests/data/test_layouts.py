"""Rows in the layouts of public preference sets, with invented content: the pair that each of them means, or why it is refused.

The layouts are those of the sets' cards and of the loaders that docs/data.md names.
"""

from typing import Any, NamedTuple

import pytest

from minicache.data.columns import Reading
from minicache.data.formats import to_pairs
from minicache.errors import RowRefused

Row = dict[str, Any]
ASK, GOOD, BAD = "What is rain made of?", "It is made of water.", "It is made of sand."
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
BEST, MIDDLE = "Rain is water that falls from clouds.", "Of something wet."
USER, CHOSEN, REJECTED = (
    {"role": "user", "content": ASK},
    {"role": "assistant", "content": GOOD},
    {"role": "assistant", "content": BAD},
)
PLAIN = (f"user: {ASK}", f"assistant: {GOOD}", f"assistant: {BAD}")


class Layout(NamedTuple):
    """pairs: prompt, chosen and rejected of each pair in words, or the reason of the refusal. unused: columns that are listed."""

    row: Row
    pairs: list[tuple[str, str, str]] | str = [PLAIN]  # noqa: RUF012
    reading: Reading = Reading()
    unused: tuple[str, ...] = ()


LAYOUTS: dict[str, Layout] = {
    "HuggingFaceH4/ultrafeedback_binarized": Layout(
        {
            "prompt": ASK,
            "prompt_id": "f0",
            "chosen": [USER, CHOSEN],
            "rejected": [USER, REJECTED],
            "messages": [USER, CHOSEN],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
        unused=("prompt_id", "score_chosen", "score_rejected"),
    ),
    "openbmb/UltraFeedback": Layout(
        {
            "source": "evol",
            "instruction": ASK,
            "models": ["a", "b", "c"],
            "completions": [
                {"response": MIDDLE, "overall_score": 6.0, "model": "a", "critique": "Well."},
                {"response": BAD, "overall_score": 2.0, "model": "b", "critique": "No."},
                {"response": BEST, "overall_score": 8.5, "model": "c", "critique": "Yes."},
            ],
        },
        [(f"user: {ASK}", f"assistant: {BEST}", f"assistant: {BAD}")],
        Reading(pairs="best-worst"),
        ("source", "models", "completions.model", "completions.critique"),
    ),
    "openbmb/UltraFeedback, with the system text of each answer": Layout(
        {
            "instruction": ASK,
            "completions": [
                {"response": GOOD, "overall_score": 6.0, "custom_system_prompt": "Be true."},
                {"response": BAD, "overall_score": 2.0, "custom_system_prompt": "Be brief."},
            ],
        },
        "unused-field: completions.custom_system_prompt",
        Reading(pairs="best-worst"),
    ),
    "argilla/ultrafeedback-binarized-preferences": Layout(
        {
            "source": "evol",
            "instruction": ASK,
            "chosen_response": GOOD,
            "rejected_response": BAD,
            "chosen_avg_rating": 4.75,
            "rejected_avg_rating": 3.0,
            "chosen_model": "a",
        },
        unused=("source", "chosen_avg_rating", "rejected_avg_rating", "chosen_model"),
    ),
    "argilla/dpo-mix-7k": Layout(
        {
            "dataset": "argilla/capybara",
            "chosen": [USER, CHOSEN],
            "rejected": [USER, REJECTED],
            "chosen_rating": 5.0,
            "rejected_rating": 4.0,
        },
        unused=("dataset", "chosen_rating", "rejected_rating"),
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": Layout(
        {
            "system": "Be brief.",
            "input": ASK,
            "chosen": GOOD,
            "rejected": BAD,
            "generations": [GOOD, BAD],
            "order": ["chosen", "rejected"],
            "rating": [9.0, 1.0],
            "status": "unchanged",
        },
        [(f"system: Be brief. | user: {ASK}", PLAIN[1], PLAIN[2])],
        unused=("generations", "order", "rating", "status"),
    ),
    "Intel/orca_dpo_pairs": Layout(
        {"system": "Be brief.", "question": ASK, "chosen": GOOD, "rejected": BAD},
        [(f"system: Be brief. | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "Anthropic/hh-rlhf": Layout(
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASK}\n\nAssistant: {BAD}",
        },
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "Dahoas/full-hh-rlhf": Layout(
        {
            "prompt": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASK}\n\nAssistant:",
            "response": f" {GOOD}",
            "chosen": f" {GOOD}",
            "rejected": f" {BAD}",
        },
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
        unused=("response",),
    ),
    "PKU-Alignment/PKU-SafeRLHF": Layout(
        {
            "prompt": ASK,
            "response_0": BAD,
            "response_1": GOOD,
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        unused=("safer_response_id",),
    ),
    "nvidia/HelpSteer2": Layout(
        {"prompt": ASK, "response": GOOD, "helpfulness": 4, "correctness": 4, "coherence": 4, "verbosity": 1},
        "missing-field: preference",
    ),
    "nvidia/HelpSteer2, preference": Layout(
        {
            "prompt": ASK,
            "response_1": GOOD,
            "response_2": BAD,
            "preference_strength": -2,
            "preference_statement": "The first is right.",
            "split": "train",
        },
        unused=("preference_statement", "split"),
    ),
    "nvidia/HelpSteer3": Layout(
        {
            "domain": "stem",
            "language": "english",
            "context": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER],
            "response1": BAD,
            "response2": GOOD,
            "overall_preference": 3,
            "individual_preference": [{"score": 3, "reasoning": "True."}],
        },
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
        unused=("domain", "language", "individual_preference"),
    ),
    "nvidia/HelpSteer3, a tie": Layout(
        {"context": [USER], "response1": BAD, "response2": GOOD, "overall_preference": 0}, "tie: neither"
    ),
    "stanfordnlp/SHP": Layout(
        {
            "post_id": "x1",
            "domain": "askscience",
            "history": ASK,
            "human_ref_A": BAD,
            "human_ref_B": GOOD,
            "labels": 0,
            "score_A": 3,
            "score_B": 30,
            "score_ratio": 10.0,
        },
        unused=("post_id", "domain", "score_A", "score_B", "score_ratio"),
    ),
    "lmsys/chatbot_arena_conversations": Layout(
        {
            "question_id": "q1",
            "model_a": "a",
            "model_b": "b",
            "winner": "model_b",
            "conversation_a": [USER, REJECTED],
            "conversation_b": [USER, CHOSEN],
            "turn": 1,
        },
        unused=("question_id", "model_a", "model_b", "turn"),
    ),
    "lmsys/chatbot_arena_conversations, a tie": Layout(
        {"winner": "tie (bothbad)", "conversation_a": [USER, REJECTED], "conversation_b": [USER, CHOSEN]},
        "tie: neither",
    ),
    "lmarena-ai/arena-human-preference-55k": Layout(
        {
            "id": 1,
            "prompt": f'["{ASK}"]',
            "response_a": f'["{GOOD}"]',
            "response_b": f'["{BAD}"]',
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        unused=("id",),
    ),
    "lmarena-ai/arena-human-preference-140k": Layout(
        {
            "id": "u1",
            "winner": "model_a",
            "conversation_a": [
                {"role": turn["role"], "content": [{"type": "text", "text": turn["content"], "image": None}]}
                for turn in (USER, CHOSEN)
            ],
            "conversation_b": [USER, REJECTED],
            "is_code": False,
        },
        unused=("id", "is_code"),
    ),
    "openbmb/UltraInteract_pair": Layout(
        {
            "task": "Math",
            "dataset": "gsm",
            "trajectory": [{"from": "user", "value": ASK}],
            "chosen": GOOD,
            "rejected": BAD,
            "id": "a",
            "parent_id": "b",
        },
        unused=("task", "dataset", "id", "parent_id"),
    ),
    "xinlai/Math-Step-DPO-10K": Layout(
        {
            "dataset": "math",
            "prompt": ASK,
            "initial_reason_steps": "Let's think step by step.\nStep 1: Clouds.\nStep 2:",
            "chosen": " Water.",
            "rejected": " Sand.",
            "full_chosen": " Water. So it is water.",
            "full_rejected": " Sand. So it is sand.",
            "answer": "water",
        },
        [
            (
                f"user: {ASK} | opening: Let's think step by step.\nStep 1: Clouds.\nStep 2:",
                "assistant: Let's think step by step.\nStep 1: Clouds.\nStep 2: Water.",
                "assistant: Let's think step by step.\nStep 1: Clouds.\nStep 2: Sand.",
            )
        ],
        unused=("dataset", "full_chosen", "full_rejected", "answer"),
    ),
    "tasksource/oasst1_pairwise_rlhf_reward": Layout(
        {
            "lang": "en",
            "parent_id": "p",
            "prompt": f"<|prompter|>Hi<|endoftext|><|assistant|>Hello<|endoftext|><|prompter|>{ASK}<|endoftext|><|assistant|>",
            "chosen": GOOD,
            "rejected": BAD,
        },
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
        unused=("lang", "parent_id"),
    ),
    "berkeley-nest/Nectar": Layout(
        {
            "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
            "answers": [
                {"answer": MIDDLE, "model": "a", "rank": 2.0},
                {"answer": BEST, "model": "b", "rank": 1.0},
                {"answer": BAD, "model": "c", "rank": 3.0},
            ],
            "turns": 1,
            "num_responses": 3,
            "source": ["x"],
            "good_natured": True,
        },
        [
            (f"user: {ASK}", f"assistant: {BEST}", f"assistant: {MIDDLE}"),
            (f"user: {ASK}", f"assistant: {BEST}", f"assistant: {BAD}"),
        ],
        Reading(pairs="best-each"),
        ("answers.model", "turns", "num_responses", "source", "good_natured"),
    ),
    "lvwerra/stack-exchange-paired": Layout(
        {"qid": 1, "question": ASK, "date": "2020", "metadata": ["x"], "response_j": GOOD, "response_k": BAD},
        unused=("qid", "date", "metadata"),
    ),
    "HuggingFaceH4/stack-exchange-preferences": Layout(
        {
            "qid": 1,
            "question": ASK,
            "answers": [
                {"answer_id": 1, "pm_score": 1, "selected": False, "text": BAD},
                {"answer_id": 2, "pm_score": 3, "selected": True, "text": GOOD},
            ],
        },
        reading=Reading(pairs="all"),
        unused=("qid", "answers.answer_id", "answers.selected"),
    ),
    "hiyouga/DPO-En-Zh-20k": Layout(
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        }
    ),
    "LLaMA-Factory, alpaca": Layout(
        {
            "instruction": "Answer.",
            "input": ASK,
            "chosen": GOOD,
            "rejected": BAD,
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        [(f"system: Be brief. | user: Hi | assistant: Hello | user: Answer.\n{ASK}", PLAIN[1], PLAIN[2])],
    ),
    "LLaMA-Factory, comparison_gpt4": Layout(
        {"instruction": ASK, "input": "", "output": [GOOD, BAD]}, reading=Reading(pairs="best-worst")
    ),
    "jondurbin/truthy-dpo-v0.1": Layout(
        {"id": "1", "source": "x", "system": "", "prompt": ASK, "chosen": GOOD, "rejected": BAD},
        unused=("id", "source"),
    ),
    "mlabonne/orpo-dpo-mix-40k": Layout(
        {"source": "x", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "prompt": ASK, "question": None},
        unused=("source",),
    ),
    "Skywork/Skywork-Reward-Preference-80K": Layout(
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "source": "x"}, unused=("source",)
    ),
    "openai/summarize_from_feedback": Layout(
        {
            "info": {"id": "t", "post": ASK, "title": "Rain", "subreddit": "x"},
            "summaries": [{"text": BAD, "policy": "a"}, {"text": GOOD, "policy": "b"}],
            "choice": 1,
            "worker": "w",
        },
        reading=Reading(columns="prompt=info.post"),
        unused=("worker", "info.id", "info.title", "info.subreddit"),
    ),
    "openai/webgpt_comparisons": Layout(
        {"question": {"id": "1", "full_text": ASK}, "answer_0": GOOD, "answer_1": BAD, "score_0": 1.0, "score_1": -1.0}
    ),
    "m-a-p/COIG-P": Layout(
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
            "domain": "x",
        },
        unused=("domain",),
    ),
    "ms-swift, rejected_response": Layout({"messages": [USER, CHOSEN], "rejected_response": BAD}),
    "ms-swift, rejected_messages": Layout({"messages": [USER, CHOSEN], "rejected_messages": [USER, REJECTED]}),
    "conversations, and all turns in both sides": Layout(
        {"conversations": [USER], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
    ),
    "conversations with a system turn, and the other turns in both sides": Layout(
        {
            "conversations": [{"role": "system", "content": "Be brief."}, USER],
            "chosen": [USER, CHOSEN],
            "rejected": [USER, REJECTED],
        },
        [(f"system: Be brief. | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "the last question in both sides": Layout(
        {"conversations": [*EARLIER, USER], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "conversations that end in an answer, and sides that ask again": Layout(
        {"conversations": EARLIER, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "conversations, and another prompt in both sides": Layout(
        {"conversations": EARLIER[:1], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        "prompts-differ: conversations",
    ),
    **{
        f"{name} with the {answer['content']}": Layout(
            {name: [USER, answer], "chosen": [CHOSEN], "rejected": [REJECTED]}
        )
        for name in ("prompt", "messages", "conversations", "conversation")
        for answer in (CHOSEN, REJECTED)
    },
    **{
        f"{name} with the chosen answer, texts": Layout({name: [USER, CHOSEN], "chosen": GOOD, "rejected": BAD})
        for name in ("prompt", "messages", "conversations")
    },
    "conversations with all turns of the chosen side": Layout(
        {"conversations": [USER, CHOSEN, *EARLIER], "chosen": [CHOSEN, *EARLIER], "rejected": [REJECTED]},
        [(f"user: {ASK}", f"{PLAIN[1]} | user: Hi | assistant: Hello", PLAIN[2])],
    ),
    "messages with an opening that both answers go on from": Layout(
        {"messages": [USER, {**CHOSEN, "content": "It "}], "chosen": [CHOSEN], "rejected": [REJECTED]},
        [(f"user: {ASK} | opening: It ", f"assistant: It {GOOD}", f"assistant: It {BAD}")],
    ),
    "axolotl, chat_template.default": Layout({"messages": [USER], "chosen": CHOSEN, "rejected": REJECTED}),
    "distilabel": Layout(
        {"instruction": ASK, "generations": [BAD, GOOD], "ratings": [1, 5], "generation_models": ["a", "b"]},
        reading=Reading(pairs="best-worst"),
        unused=("generation_models",),
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": Layout(
        {
            "source": "x",
            "conversation": [{"input": ASK, "output": MIDDLE}],
            "original_response": MIDDLE,
            "generation_prompt": ["rendered"],
            "prompt": ASK,
            "chosen": [USER, CHOSEN],
            "rejected": [USER, REJECTED],
            "rating_chosen": 5,
        },
        unused=("source", "original_response", "generation_prompt", "rating_chosen"),
    ),
    "argilla/distilabel-intel-orca-dpo-pairs, a tie": Layout(
        {"system": "", "input": ASK, "chosen": GOOD, "rejected": BAD, "status": "tie"}, "tie: by 'status'"
    ),
    "tasksource/oasst1_pairwise_rlhf_reward, in lines": Layout(
        {"prompt": f"prompter: Hi\nassistant: Hello\nthere\nprompter: {ASK}", "chosen": GOOD, "rejected": BAD},
        [(f"user: Hi | assistant: Hello\nthere | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "tasksource/oasst1_pairwise_rlhf_reward, answers of users": Layout(
        {"prompt": "prompter: Hi\nassistant: Hello", "chosen": GOOD, "rejected": BAD}, "prompts-differ: a user's"
    ),
    "PKU-Alignment/PKU-SafeRLHF, by safety": Layout(
        {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 0, "safer_response_id": 1},
        reading=Reading(columns="better_response_id=safer_response_id"),
    ),
    "shibing624/DPO-En-Zh-20k-Preference": Layout(
        {
            "system": "",
            "history": [["Hi", "Hello"]],
            "question": ASK,
            "response_chosen": GOOD,
            "response_rejected": BAD,
        },
        [(f"user: Hi | assistant: Hello | user: {ASK}", PLAIN[1], PLAIN[2])],
    ),
    "ms-swift, an agent": Layout(
        {
            "messages": [
                USER,
                {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'},
                {"role": "tool_response", "content": "wet"},
                CHOSEN,
            ],
            "rejected_response": BAD,
        },
        [(f"user: {ASK}", f"assistant:  | tool: wet | assistant: {GOOD}", PLAIN[2])],
    ),
    "axolotl, texts": Layout({"messages": [USER], "chosen": GOOD, "rejected": BAD}),
    "NeMo RL": Layout(
        {
            "context": [USER],
            "completions": [{"rank": 1, "completion": [REJECTED]}, {"rank": 0, "completion": [CHOSEN]}],
        },
        reading=Reading(pairs="best-worst"),
    ),
    "NeMo RL, texts": Layout(
        {"context": [USER], "completions": [{"rank": 0, "completion": GOOD}, {"rank": 1, "completion": BAD}]},
        reading=Reading(pairs="best-worst"),
    ),
    "NCSOFT/offsetbias": Layout({"instruction": ASK, "output_1": BAD, "output_2": GOOD, "label": 2}),
    "prometheus-eval/Preference-Collection": Layout(
        {
            "orig_instruction": ASK,
            "orig_response_A": GOOD,
            "orig_response_B": BAD,
            "orig_preference": "A",
            "instruction": "Judge these.",
            "output": "A",
            "orig_score_A": "5",
        },
        unused=("orig_score_A", "instruction", "output"),
    ),
    "other names, nested": Layout(
        {"ask": {"text": ASK}, "out": [{"said": BAD}, {"said": GOOD}], "id": 3},
        reading=Reading(columns="prompt=ask.text,chosen=out.1.said,rejected=out.0.said"),
        unused=("id",),
    ),
}


def words(pair: Any) -> tuple[str, str, str]:
    prompt, *sides = (
        " | ".join(f"{turn.role}: {turn.content}" for turn in turns)
        for turns in (pair.prompt, pair.chosen, pair.rejected)
    )
    return (f"{prompt} | opening: {pair.opening}" if pair.opening else prompt, sides[0], sides[1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_in_a_published_layout_is_read_whole_or_refused_by_name(name: str) -> None:
    layout = LAYOUTS[name]
    if isinstance(layout.pairs, str):
        reason, _, named = layout.pairs.partition(": ")
        with pytest.raises(RowRefused, match=named) as refused:
            to_pairs(layout.row, "f", 1, layout.reading)
        assert refused.value.reason == reason
        return
    pairs = to_pairs(layout.row, "f", 1, layout.reading)
    assert [words(pair) for pair in pairs] == layout.pairs
    listed = [note.detail for note in pairs[0].notes if note.kind == "unused"]
    assert sorted(listed) == sorted(layout.unused)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.reading.pairs])
def test_a_ranked_list_without_pairs_names_the_option(name: str) -> None:
    if isinstance(LAYOUTS[name].pairs, list):
        with pytest.raises(RowRefused, match="--pairs best-worst, best-each or all"):
            to_pairs(LAYOUTS[name].row, "f", 1)
