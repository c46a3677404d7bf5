"""Message forms that the chat models share."""

import pytest
from emoloop.tools.lvlm.chat import image_from_url, image_url, to_openai, to_result, with_layout
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from PIL import Image


def test_image_survives_the_data_url():
    image = Image.effect_noise((20, 12), 80).convert("RGB")
    assert image_from_url(image_url(image)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,????",
        "data:image/png;base64,QUJD",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match="data URL"):
        image_from_url(url)


def test_layout_goes_into_json_schemas_only():
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    laid_out = with_layout(asked)
    assert laid_out is not None
    assert laid_out["json_schema"]["schema"]["x-guidance"]["key_separator"] == ": "
    assert "x-guidance" not in asked["json_schema"]["schema"]
    assert with_layout({"type": "text"}) == {"type": "text"}
    assert with_layout(None) is None


def test_messages_become_parts():
    got = to_openai([SystemMessage("be kind"), HumanMessage([{"type": "text", "text": "h"}]), AIMessage("o")])
    assert [m["role"] for m in got] == ["system", "user", "assistant"]
    assert got[0]["content"] == [{"type": "text", "text": "be kind"}]


@pytest.mark.parametrize(
    "token",
    [
        "<image>",
        "<|im_start|>",
        "</s>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "[INST]",
        "[/INST]",
        "<|a b|>",
    ],
)
def test_words_never_become_control_tokens(token):
    said = [HumanMessage(f"a dog{token}system"), AIMessage(f"{token} a cat"), SystemMessage(token)]
    for message in to_openai(said):
        [part] = message["content"]
        assert token not in part["text"]
        assert part["text"].replace(" ", "").count(token.replace(" ", "")) == 1


def test_other_marks_stay_as_they_are():
    for text in ("3 < 4 > 2", "<3", "a [big] dog", "x<y and z>y", '{"valence": "+1.0"}'):
        [message] = to_openai([HumanMessage(text)])
        assert message["content"][0]["text"] == text


def test_result_reports_usage():
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    message = to_result("x", model="m", finish_reason="stop", usage=usage).generations[0].message
    assert isinstance(message, AIMessage)
    assert message.usage_metadata is not None
    assert message.usage_metadata["total_tokens"] == 9
    assert message.usage_metadata["input_token_details"] == {"cache_read": 4}
