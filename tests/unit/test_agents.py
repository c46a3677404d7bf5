import hashlib
import json

import pytest
from emoloop.agents.ask import Asker, read, takes_schema
from emoloop.agents.critic import Critic
from emoloop.agents.prompt import load_prompt
from emoloop.agents.rewriters import RewriteRequest, SimpleRewriter, best_prompt, load_rewriter, prompt_limit
from emoloop.agents.schemas import (
    CRITIC_SCHEMA,
    REWRITER_SCHEMA,
    CriticAnswer,
    RewriterAnswer,
    RewriterAnswers,
    average,
    signed,
    target_text,
)
from emoloop.domain import Candidate, Critique, Emotion, EmotionTarget, Missing, Round, UserError
from emoloop.tools.lvlm.vllm import VLLMChat
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_openai.chat_models.base import BaseChatOpenAI
from PIL import Image
from pydantic import SecretStr
from scripted import Scripted, critic_answer

PICTURE = Image.new("RGB", (16, 16), (200, 120, 90))
TARGET = EmotionTarget(valence=2, arousal=-1)


def candidate(round: int, valence: float, arousal: float, reward: float, prompt: str = "p") -> Candidate:
    critique = Critique(valence=valence, arousal=arousal, alignment=0.8, category=Emotion.AWE)
    return Candidate(
        round=round, index=0, prompt=prompt, seed=1, sha256="0" * 64, critique=critique, reward=reward
    )


# ---- schemas


def test_the_schemas_are_frozen():
    digest = hashlib.sha256(json.dumps([CRITIC_SCHEMA, REWRITER_SCHEMA]).encode()).hexdigest()
    assert digest[:16] == "15b76c426183c80a", (
        "the embedded model was trained on version 1: add a version instead"
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("critic", "1880cb0f36285e18"),
        ("rewriter", "81f1c1f353adf646"),
        ("critic-compact", "80bebe14fe6f9e6c"),
        ("rewriter-compact", "c4083d2df348fa57"),
    ],
)
def test_a_prompt_that_changes_changes_its_version(name, digest):
    prompt = load_prompt(name)
    assert prompt.id == f"{name}@1"
    text = "\0".join((prompt.version, prompt.system, prompt.task, prompt.question))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_numbers_have_one_form():
    assert [signed(x) for x in (2, -1.04, -0.04, 0.0, 0.25)] == ["+2.0", "-1.0", "+0.0", "+0.0", "+0.2"]


def test_a_target_in_words():
    assert target_text(TARGET) == "valence +2.0 arousal -1.0"
    assert target_text(EmotionTarget(arousal=0.5)) == "arousal +0.5"
    assert target_text(EmotionTarget(category=Emotion.AWE)) == "valence +1.2 arousal +1.5 category awe"
    assert target_text(EmotionTarget(valence=1, category=Emotion.AWE)) == "valence +1.0 category awe"


@pytest.mark.parametrize("value", ["+1.5", "1.5", 1.5, " 1.5 "])
def test_numbers_are_read_leniently(value):
    assert (
        CriticAnswer.model_validate(json.loads(critic_answer(valence=0)) | {"valence": value}).valence == 1.5
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"valence": "+3.7"}, ("valence", 3.0)),
        ({"arousal": "-3.9"}, ("arousal", -3.0)),
        ({"alignment": "1.4"}, ("alignment", 1.0)),
        ({"valence": "\N{MINUS SIGN}1.0"}, ("valence", -1.0)),
    ],
)
def test_what_the_pattern_allows_beyond_the_scale_is_its_end(change, expected):
    answer = CriticAnswer.model_validate(json.loads(critic_answer()) | change)
    assert getattr(answer, expected[0]) == expected[1]


@pytest.mark.parametrize(
    "change",
    [
        {"valence": "7"},
        {"alignment": 85},
        {"alignment": -0.2},
        {"valence": "high"},
        {"valence": True},
        {"valence": None},
        {"category": "joy"},
        {"arousal": "nan"},
    ],
)
def test_another_scale_is_not_guessed(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        read(json.dumps(json.loads(critic_answer()) | change), CriticAnswer)


# ---- reading text


def test_the_object_is_found_in_any_text():
    good = critic_answer(valence=1.2)
    for text in (
        good,
        f"```json\n{good}\n```",
        f'<think>the form is {{"analysis": "..."}} …</think> Here: {good} Hope this helps {{:-)',
        good.replace('"a picture"', '"two\nlines"'),
    ):
        assert read(text, CriticAnswer).valence == 1.2


def test_the_last_object_that_reads_well_counts():
    text = f"draft {critic_answer(valence=0.1)} final {critic_answer(valence=0.9)} and {{}}"
    assert read(text, CriticAnswer).valence == 0.9


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "empty"), ("a lovely picture", "no JSON object"), ('{"valence": "+1.0"}', "Field required")],
)
def test_a_bad_answer_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        read(text, CriticAnswer)


def test_a_prompt_comes_on_one_line():
    assert RewriterAnswer.model_validate({"prompt": " a\n dog "}).prompt == "a dog"
    assert RewriterAnswer.model_validate({"prompt": "a", "changes": ["sun", "sea"]}).changes == "sun; sea"


def test_the_mean_of_several_answers():
    several = [
        Critique(valence=1.0, arousal=0.0, alignment=1.0, category=Emotion.AWE, analysis="far"),
        Critique(valence=2.0, arousal=1.0, alignment=0.5, category=Emotion.FEAR, analysis="near"),
        Critique(valence=3.0, arousal=1.5, alignment=0.6, category=Emotion.AWE, analysis="other"),
    ]
    mean = average(several)
    assert (mean.valence, mean.samples, mean.analysis) == (2.0, 3, "near")
    assert mean.category is Emotion.AWE
    assert mean.valence_spread == pytest.approx((2 / 3) ** 0.5)
    assert average(several[:1]) is several[0]


# ---- prompts


def test_the_compact_critic_prompt_is_what_the_model_was_trained_on():
    system, user = load_prompt("critic-compact").messages(
        ("data:x",), prompt="a dog", target=target_text(TARGET)
    )
    assert system.content == "critic"
    assert user.content == [
        {"type": "text", "text": "prompt: a dog\ntarget: valence +2.0 arousal -1.0\n"},
        {"type": "image_url", "image_url": {"url": "data:x"}},
        {"type": "text", "text": "critique:"},
    ]


async def test_the_compact_rewriter_prompt_has_the_last_two_rounds():
    model = Scripted()
    rounds = [
        Round(prompt=f"try {i}", candidates=[candidate(i, 0.5 * i, -0.04, 0.1)] if i != 1 else [])
        for i in range(4)
    ]
    await SimpleRewriter(model, "rewriter-compact").rewrite(RewriteRequest("a dog", TARGET, rounds))
    [[system, user]] = model.seen
    assert system.content == "rewriter"
    assert user.content == [
        {
            "type": "text",
            "text": "prompt: a dog\ntarget: valence +2.0 arousal -1.0\n"
            "tried: try 2\nread: valence +1.0 arousal +0.0\n"
            "tried: try 3\nread: valence +1.5 arousal +0.0\n",
        },
        {"type": "text", "text": "rewrite:"},
    ]


async def test_the_full_prompts_show_what_was_tried():
    model = Scripted()
    await SimpleRewriter(model).rewrite(
        RewriteRequest(
            "a dog",
            TARGET,
            [Round(prompt="one", changes="sun", candidates=[candidate(0, 1, 0, 0.3)])],
            comment="no cats",
        )
    )
    text = str(model.seen[0][1].content)
    for part in (
        "Neutral prompt: a dog",
        "round 0: one",
        "Changed then: sun",
        "valence +1.0",
        "says: no cats",
    ):
        assert part in text
    assert "400 characters" in str(model.seen[0][0].content)


async def test_pictures_come_after_the_text_and_before_a_short_question():
    model = Scripted()
    await Critic(model).critique(PICTURE, "a dog", TARGET)
    parts = [part["type"] for part in model.seen[0][1].content]
    assert parts == ["text", "image_url", "text"]
    assert len(model.seen[0][1].content[2]["text"]) < 80


def test_prompt_files_are_checked(tmp_path):
    with pytest.raises(UserError, match="known are critic, "):
        load_prompt("nothing")
    (tmp_path / "bad.yaml").write_text("name: x\nversion: 1\n")
    with pytest.raises(UserError, match="the keys"):
        load_prompt(str(tmp_path / "bad.yaml"))
    good = {"name": "x", "version": 2, "system": "s", "task": "{{ wrong }}", "question": "q"}
    (tmp_path / "good.yaml").write_text(json.dumps(good))
    prompt = load_prompt(str(tmp_path / "good.yaml"))
    assert prompt.id == "x@2"
    with pytest.raises(UserError, match="'wrong' is undefined"):
        prompt.messages()


# ---- asking


async def test_any_chat_model_will_do():
    model = GenericFakeChatModel(messages=iter([AIMessage(f"I think: {critic_answer(valence=-1.5)}")]))
    critique = await Critic(model).critique(PICTURE, "a dog", TARGET)
    assert isinstance(critique, Critique)
    assert critique.valence == -1.5


async def test_a_bad_answer_is_asked_for_again_once():
    model = Scripted(fail=lambda role, number: ("no idea", None)[number])
    reading = await Critic(model).read(PICTURE, "a dog", TARGET)
    assert isinstance(reading.critique, Critique)
    assert reading.usage["total_tokens"] == 30
    said = model.seen[1]
    assert said[-2].content == "no idea"
    assert "no JSON object" in str(said[-1].content)


async def test_after_two_bad_answers_the_critique_is_missing_with_its_text():
    model = Scripted(fail=lambda role, number: f"nonsense {number}")
    critique = await Critic(model).critique(PICTURE, "a dog", TARGET)
    assert isinstance(critique, Missing)
    assert "second try" in critique.reason
    assert critique.raw == "nonsense 1"
    assert model.calls == {"critic": 2}


async def test_a_model_that_is_down_is_a_missing_critique():
    model = Scripted(fail=lambda role, number: ConnectionError("refused\nby peer"))
    reading = await Critic(model).read(PICTURE, "a dog", TARGET)
    assert reading.critique == Missing(reason="ConnectionError: refused by peer")
    assert isinstance(reading.error, ConnectionError)


async def test_a_model_that_hangs_is_a_missing_critique():
    critique = await Critic(Asker(Scripted(delay=30), timeout=0.05)).critique(PICTURE, "a dog", TARGET)
    assert critique == Missing(reason="no answer within 0.05 s")


async def test_samples_are_averaged_and_bad_ones_left_out():
    answers = [critic_answer(valence=1.0), critic_answer(valence=2.0), "garbage", "garbage"]
    model = Scripted(fail=lambda role, number: answers[number])
    critique = await Critic(model, samples=3).critique(PICTURE, "a dog", TARGET)
    assert isinstance(critique, Critique)
    assert (critique.valence, critique.samples, critique.valence_spread) == (1.5, 2, 0.5)


@pytest.mark.parametrize("text", ['{"a":' * 10_000, "{" * 60_000, "{" * 200_000, "x" * 70_000])
async def test_an_answer_of_any_size_and_depth_is_a_missing_critique(text):
    critique = await Critic(Scripted(fail=lambda *_: text)).critique(PICTURE, "a dog", TARGET)
    assert isinstance(critique, Missing)
    assert len(critique.raw or "") <= 2000


async def test_a_far_too_long_analysis_is_not_kept():
    long = critic_answer(analysis="x" * 5000)
    critique = await Critic(Scripted(fail=lambda *_: long)).critique(PICTURE, "a dog", TARGET)
    assert isinstance(critique, Missing)
    assert "4000 characters" in critique.reason


async def test_what_a_model_writes_is_cleaned():
    dirty = "a \x1b[31mred\x1b[0m\x00 dog \ud83d\u202e \N{DOG FACE}"
    critique = await Critic(Scripted(fail=lambda *_: critic_answer(analysis=dirty))).critique(
        PICTURE, "a dog", TARGET
    )
    assert isinstance(critique, Critique)
    assert critique.analysis == "a red dog  \N{DOG FACE}"
    answer = json.dumps({"why": "w", "changes": [dirty], "prompt": dirty})
    rewrite = await SimpleRewriter(Scripted(fail=lambda *_: answer)).rewrite(RewriteRequest("a dog", TARGET))
    assert (rewrite.prompt, rewrite.changes) == ("a red dog \N{DOG FACE}", "a red dog  \N{DOG FACE}")
    missing = await Critic(Scripted(fail=lambda *_: "no \x1b[31m\ud83d")).critique(PICTURE, "a dog", TARGET)
    assert isinstance(missing, Missing)
    assert missing.raw == "no "


def test_who_takes_a_schema():
    class Mine(BaseChatOpenAI): ...

    class Namesake:
        """No client of OpenAI's, whatever it is called."""

    Namesake.__name__ = "BaseChatOpenAI"
    openai = Mine(model="m", api_key=SecretStr("k"))
    assert takes_schema(openai)
    assert takes_schema(openai.bind(seed=1))
    assert takes_schema(VLLMChat(model="m"))
    assert takes_schema(VLLMChat(model="m").bind(seed=1))
    assert not takes_schema(Namesake())
    assert not takes_schema(Scripted())


# ---- rewriter


async def test_a_rewrite():
    rewrite = await SimpleRewriter(Scripted()).rewrite(RewriteRequest("a dog", TARGET))
    assert rewrite.prompt.startswith("a dog by the sea")
    assert (rewrite.changes, rewrite.why, rewrite.refused) == ("light", "because", None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (json.dumps({"why": "", "changes": "", "prompt": "  "}), "empty prompt"),
        (json.dumps({"why": "", "changes": "", "prompt": "x" * 401}), "401 characters, 400 are allowed"),
        ("sorry", "no JSON object"),
        (ConnectionError("down"), "ConnectionError: down"),
    ],
)
async def test_a_bad_rewrite_keeps_the_best_prompt(answer, said):
    rounds = [
        Round(prompt="first", candidates=[candidate(0, 0, 0, 0.2, "first")]),
        Round(prompt="better", candidates=[candidate(1, 1, 0, 0.6, "better")]),
        Round(prompt="worse", candidates=[candidate(2, 0, 0, 0.1, "worse")]),
    ]
    rewrite = await SimpleRewriter(Scripted(fail=lambda *_: answer)).rewrite(
        RewriteRequest("a dog", TARGET, rounds)
    )
    assert rewrite.prompt == "better"
    assert rewrite.refused is not None and said in rewrite.refused
    assert rewrite.why.startswith("kept the best prompt so far")


def test_the_limit_follows_long_neutral_prompts():
    assert prompt_limit("a dog") == 400
    assert prompt_limit("x" * 300) == 600
    assert best_prompt("neutral", [Round(prompt="unread")]) == "neutral"


@pytest.mark.parametrize(
    ("name", "prompts", "calls"),
    [
        ("keep", ["a dog"] * 3, 0),
        ("one_shot", ["a dog by the sea"] * 3, 1),
        ("emoloop.agents.rewriters.simple:SimpleRewriter", None, 3),
    ],
)
async def test_a_rewriter_by_name(name, prompts, calls):
    model = Scripted(fail=lambda *_: json.dumps({"prompt": "a dog by the sea"}) if prompts else None)
    rewriter = load_rewriter(name, Asker(model))
    rounds, found = [], []
    for number in range(3):
        rewrite = await rewriter.rewrite(RewriteRequest("a dog", TARGET, rounds))
        found.append(rewrite.prompt)
        rounds.append(Round(prompt=rewrite.prompt, candidates=[candidate(number, 0, 0, 0.1)]))
    assert sum(model.calls.values()) == calls
    assert prompts is None or found == prompts


def test_a_rewriter_that_is_none_is_refused():
    with pytest.raises(UserError, match="unknown rewriter 'smple': did you mean 'simple'"):
        load_rewriter("smple", Asker(Scripted()))
    with pytest.raises(UserError, match="has no name, model, prompt_id, rewrite"):
        load_rewriter("builtins:slice", Asker(Scripted()))


def test_a_prompt_file_in_another_encoding_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"mine\.yaml is not UTF-8"):
        load_prompt(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "said",
    [
        {"why": "w", "prompts": [{"changes": "light", "prompt": " a\n dog "}, "a cat"]},
        {"why": "w", "prompts": ["a dog", {"prompt": "a cat"}]},
    ],
)
def test_several_rewrites_are_read_leniently(said):
    answer = RewriterAnswers.model_validate(said)
    assert [it.prompt for it in answer.prompts] == ["a dog", "a cat"]


def test_one_rewrite_where_several_were_wanted_is_one():
    answer = RewriterAnswers.model_validate({"why": "w", "changes": "light", "prompt": "a dog"})
    assert [(it.prompt, it.changes) for it in answer.prompts] == [("a dog", "light")]
    with pytest.raises(ValueError, match="prompts"):
        RewriterAnswers.model_validate({"why": "w", "prompts": []})
