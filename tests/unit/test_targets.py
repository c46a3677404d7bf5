"""One neutral prompt for several targets."""

import json

import pytest
from emoloop.domain import Emotion, EmotionTarget, UserError
from emoloop.graph.collect import read_line
from emoloop.graph.targets import read_targets, with_targets


def test_targets_in_words():
    assert read_targets("fear, 2/-1,/1") == [
        EmotionTarget(category=Emotion.FEAR),
        EmotionTarget(valence=2, arousal=-1),
        EmotionTarget(arousal=1),
    ]
    for wrong in ("", "joyful", "9/1", "x/1"):
        with pytest.raises(UserError):
            read_targets(wrong)


def test_each_line_without_a_target_stands_once_for_each(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(
        '{"prompt": "a dog"}\n\nno json\n{"prompt": "a cat", "valence": 1}\n{"prompt": "a fox"}\n'
    )
    out = with_targets(source, read_targets("fear,2/-1"))
    lines = out.read_text().splitlines()
    assert out.name == "prompts.targets.jsonl" and with_targets(source, read_targets("fear,2/-1")) == out
    assert lines[2] == "no json" and len(lines) == 6
    requests = [read_line(number, lines[number]) for number in (0, 1, 3, 4, 5)]
    assert [it.prompt for it in requests] == ["a dog", "a dog", "a cat", "a fox", "a fox"]
    # one prompt, one number, one seed
    assert [it.line for it in requests] == [1, 1, 3, 5, 5]
    assert json.loads(lines[1])["target"] == {"valence": 2.0, "arousal": -1.0}
    with pytest.raises(UserError, match="cannot read"):
        with_targets(tmp_path / "none", [])
