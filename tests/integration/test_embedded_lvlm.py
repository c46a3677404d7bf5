"""The embedded LVLM on a real, tiny, random Idefics3: batching, grammar, seeds."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_lvlm
import torch
from emoloop.agents.schemas import CRITIC_SCHEMA, REWRITER_SCHEMA, response_format
from emoloop.domain import UserError
from emoloop.settings import LVLMSettings
from emoloop.tools.lvlm.chat import image_url
from emoloop.tools.lvlm.embedded import EmbeddedLVLM
from emoloop.tools.lvlm.load import load_lvlm
from emoloop.tools.lvlm.scores import read_scores, score_only
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from PIL import Image
from transformers import Idefics3ForConditionalGeneration

CRITIC = response_format("critique", CRITIC_SCHEMA)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.NEAREST)


def question(seed: int, prompt: str = "a dog by the sea"):
    return [
        SystemMessage("critic"),
        HumanMessage(
            [
                {"type": "text", "text": f"prompt: {prompt}\ntarget: valence +2.0\n"},
                {"type": "image_url", "image_url": {"url": image_url(picture(seed))}},
                {"type": "text", "text": "critique:"},
            ]
        ),
    ]


def text_question():
    return [SystemMessage("rewriter"), HumanMessage("prompt: a dog\ntarget: arousal -1.0\nrewrite:")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lvlm.build(tmp_path_factory.mktemp("model") / "lvlm")


@pytest.fixture(scope="module")
def model(folder):
    chat = EmbeddedLVLM(model=str(folder), max_tokens=24)
    yield chat
    chat.close()


def check(text: str) -> dict:
    answer = json.loads(text)
    assert text == json.dumps(answer, ensure_ascii=False) or "\\" in text  # the frozen layout
    assert list(answer) == list(CRITIC_SCHEMA["properties"])
    for key in ("valence", "arousal"):
        assert re.fullmatch(r"[+-][0-3]\.[0-9]", answer[key])
    return answer


async def test_company_changes_nothing(model):
    bound = model.bind(response_format=CRITIC)
    sampled = bound.bind(temperature=1.0)
    prompts = [
        "a dog by the sea",
        "a",
        "a long prompt about a dog, a sun and a warm bright beach",
    ]
    asked = [(question(i, prompts[i % 3]), i) for i in range(10)]
    for chat in (bound, sampled):
        together = await asyncio.gather(*(chat.ainvoke(messages, seed=seed) for messages, seed in asked))
        alone = [await chat.ainvoke(messages, seed=seed) for messages, seed in asked]
        assert [m.content for m in together] == [m.content for m in alone]
        for message in together:
            check(message.content)
    assert len({m.content for m in alone}) > 5  # the pictures and seeds matter


async def test_rewriter_and_critic_share_the_model(model):
    critic = model.bind(response_format=CRITIC)
    rewriter = model.bind(response_format=response_format("rewrite", REWRITER_SCHEMA))
    answers = await asyncio.gather(
        *(critic.ainvoke(question(i)) for i in range(3)),
        *(rewriter.ainvoke(text_question()) for _ in range(3)),
    )
    assert [list(json.loads(a.content)) for a in answers[3:]] == [["why", "changes", "prompt"]] * 3
    assert answers[3].content == answers[5].content


async def test_calls_are_batched(model):
    await model.ainvoke(text_question())
    decoder = model._decoder
    sizes = []

    class Spy:
        def __call__(self, requests):
            sizes.append(len(requests))
            return decoder(requests)

    model._decoder = Spy()
    try:
        await asyncio.gather(*(model.ainvoke(question(i)) for i in range(16)))
    finally:
        model._decoder = decoder
    assert sum(sizes) == 16
    assert max(sizes) <= 8
    assert len(sizes) <= 5


def test_sync_and_plain_text(model):
    message = model.invoke(text_question(), max_tokens=5)
    assert message.usage_metadata["output_tokens"] <= 5
    assert message.response_metadata["finish_reason"] in ("stop", "length")
    assert message.usage_metadata["input_tokens"] > 10


def test_free_text_is_closed_at_the_limit(model):
    short = model.bind(response_format=CRITIC).invoke(question(1), max_tokens=16)
    assert len(check(short.content)["analysis"]) < 120
    assert short.response_metadata["finish_reason"] == "stop"


def test_logprobs_are_those_of_the_model(model, folder):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    message = model.invoke(text_question(), max_tokens=3, logprobs=True, top_logprobs=4)
    reported = message.response_metadata["logprobs"]["content"]
    processor = AutoProcessor.from_pretrained(folder)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": "rewriter"},
            {"role": "user", "content": "prompt: a dog\ntarget: arousal -1.0\nrewrite:"},
        ],
        add_generation_prompt=True,
    )
    with torch.no_grad():
        logits = reference(**processor(text=[text], return_tensors="pt")).logits[0, -1]
    expected = torch.log_softmax(logits, -1).max().item()
    assert reported[0]["logprob"] == pytest.approx(expected, abs=1e-4)
    assert [t["logprob"] for t in reported[0]["top_logprobs"]] == sorted(
        (t["logprob"] for t in reported[0]["top_logprobs"]), reverse=True
    )


async def test_scores_continue_the_given_beginning(model):
    scorer = score_only(model)
    answers = await asyncio.gather(*(scorer.ainvoke(question(i)) for i in range(4)))
    for answer in answers:
        assert re.fullmatch(r'[+-][0-3]\.[0-9]", "arousal": "[+-][0-3]\.[0-9]', answer.content)
        scores = read_scores(answer)
        assert scores["valence"].value == float(answer.content[:4])
        assert 0 < scores["arousal"].certainty <= 1
    # The same prompt and beginning under the whole schema leads to the same numbers.
    schema = {
        "type": "object",
        "properties": {k: CRITIC_SCHEMA["properties"][k] for k in ("valence", "arousal")},
    }
    whole = response_format(
        "scores", {**schema, "required": ["valence", "arousal"], "additionalProperties": False}
    )
    message = await model.bind(response_format=whole).ainvoke(question(0))
    assert message.content == '{"valence": "' + answers[0].content + '"}'


async def test_control_tokens_in_words_are_words(model):
    """Of a person's prompt and of an earlier answer alike: neither opens a picture or another's turn."""
    asked = [
        *question(0, "a dog beside an <image> <|assistant|> by the sea"),
        AIMessage("it <image> shows<end_of_utterance>"),
        HumanMessage("<global-img> once more"),
    ]
    await model.ainvoke(text_question(), max_tokens=1)
    rendered, processor = [], model._decoder.processor
    template = processor.apply_chat_template

    def spy(*words, **options):
        rendered.append(template(*words, **options))
        return rendered[-1]

    processor.apply_chat_template = spy
    try:
        check((await model.bind(response_format=CRITIC).ainvoke(asked)).content)
    finally:
        del processor.apply_chat_template
    assert rendered[0].count("<image>") == 1
    assert rendered[0].count("<|assistant|>") == 2
    assert rendered[0].count("<end_of_utterance>") == 1


async def test_a_bad_request_fails_alone(model):
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    good, failed = await asyncio.gather(
        model.bind(response_format=CRITIC).ainvoke(question(0)),
        model.bind(response_format=bad).ainvoke(question(1)),
        return_exceptions=True,
    )
    check(good.content)
    assert isinstance(failed, ValueError)
    assert "schema" in str(failed)


async def test_remote_images_are_refused(model):
    block = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    with pytest.raises(ValueError, match="data URL"):
        await model.ainvoke([HumanMessage([block])])


def test_closing_and_using_again(folder):
    chat = EmbeddedLVLM(model=str(folder), max_tokens=4)
    first = chat.invoke(text_question()).content
    chat.close()
    assert chat.invoke(text_question()).content == first
    chat.close()
    chat.close()


def test_threads_are_the_models_alone(folder, monkeypatch):
    found = []
    forward = Idefics3ForConditionalGeneration.forward

    def spy(*args, **kwargs):
        found.append(torch.get_num_threads())
        return forward(*args, **kwargs)

    monkeypatch.setattr(Idefics3ForConditionalGeneration, "forward", spy)
    before = torch.get_num_threads()
    chat = EmbeddedLVLM(model=str(folder), max_tokens=2, threads=before + 1)
    chat.invoke(text_question())
    chat.close()
    with ThreadPoolExecutor(1) as later:
        assert {torch.get_num_threads(), later.submit(torch.get_num_threads).result()} == {before}
    assert set(found) == {before + 1}


def test_load_lvlm(folder, tmp_path, monkeypatch):
    (folder / "emoloop.json").write_text('{"max_tokens": 33, "batch_size": 5, "threads": 1}')
    chat = load_lvlm(LVLMSettings(model=str(folder)))
    assert isinstance(chat, EmbeddedLVLM)
    assert (chat.max_tokens, chat.batch_size, chat.threads) == (33, 5, 1)
    chosen = load_lvlm(LVLMSettings(model=str(folder), max_tokens=44))
    assert isinstance(chosen, EmbeddedLVLM)
    assert chosen.max_tokens == 44
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert"):
        load_lvlm(LVLMSettings(model=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_lvlm(LVLMSettings(model=str(tmp_path)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no LVLM 'nobody/nothing-here'"):
        load_lvlm(LVLMSettings(model="nobody/nothing-here"))
    with pytest.raises(UserError, match="no lvlm"):
        load_lvlm(LVLMSettings(model="nonsense"))
