"""Reading numbers from the probabilities of their tokens."""

import math

import pytest
from emoloop.agents.scorer import Scorer
from emoloop.domain import EmotionTarget
from emoloop.tools.lvlm.scores import REST, read_scores, score_only
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field


def token(text, chances=None):
    chances = {text: 1.0} if chances is None else chances
    top = [{"token": t, "logprob": math.log(p)} for t, p in chances.items()]
    return {"token": text, "logprob": math.log(chances[text]), "top_logprobs": top}


def number(sign, units, tenths):
    pick = lambda chances: max(chances, key=chances.get)  # noqa: E731
    return [token(pick(sign), sign), token(pick(units), units), token("."), token(pick(tenths), tenths)]


def answer(*parts):
    content = [t for part in parts for t in (part if isinstance(part, list) else [token(part)])]
    text = "".join(t["token"] for t in content)
    return AIMessage(text, response_metadata={"logprobs": {"content": content}})


SURE = number({"+": 1.0}, {"1": 1.0}, {"5": 1.0})


def test_sure_numbers_are_what_they_say():
    got = read_scores(answer('{"valence": "', SURE, '", "arousal": "', SURE, '"}'))
    assert got["valence"].value == got["valence"].expected == 1.5
    assert got["valence"].certainty == pytest.approx(1)


def test_tenths_are_averaged_and_renormalised():
    spread = number({"+": 1.0}, {"1": 1.0}, {"4": 0.4, "6": 0.2, "x": 0.4})
    got = read_scores(answer('{"valence": "', spread, '", "arousal": "', SURE, '"}'))["valence"]
    assert got.expected == pytest.approx(1 + (0.4 * 2 / 3 + 0.6 / 3))
    assert got.certainty == pytest.approx(2 / 3)


def test_a_branch_not_taken_is_its_nearest_number():
    up = number({"+": 1.0}, {"1": 0.6, "2": 0.4}, {"9": 1.0})
    down = number({"-": 1.0}, {"2": 0.7, "1": 0.3}, {"0": 1.0})
    got = read_scores(answer('{"valence": "', up, '", "arousal": "', down, '"}'))
    assert got["valence"].expected == pytest.approx(0.6 * 1.9 + 0.4 * 2.0)
    assert got["arousal"].expected == pytest.approx(-(0.7 * 2.0 + 0.3 * 1.9))


def test_an_unsure_sign_shrinks_towards_zero():
    unsure = number({"+": 0.6, "-": 0.4}, {"0": 1.0}, {"2": 1.0})
    got = read_scores(answer('{"valence": "', unsure, '", "arousal": "', SURE, '"}'))["valence"]
    assert got.expected == pytest.approx(0.12)


def test_tokens_that_begin_before_the_sign():
    merged = [token(' "+', {' "+': 0.8, ' "-': 0.1, ' "': 0.1}), token("1"), token(".5")]
    got = read_scores(answer('{"valence":', merged, '", "arousal": "', SURE, '"}'))["valence"]
    assert got.value == 1.5
    assert got.expected == pytest.approx(1.5 * 8 / 9)


def test_the_last_mention_counts():
    text = r'{"analysis": "it said \"valence\": \"-3.0\" there", "valence": "'
    got = read_scores(answer(text, SURE, '", "arousal": "', SURE, '"}'))
    assert got["valence"].value == 1.5


def test_an_answer_without_its_given_beginning():
    got = read_scores(answer(SURE, '", "arousal": "', SURE))
    assert got["valence"].value == got["arousal"].value == 1.5


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="logprobs=True"):
        read_scores(AIMessage("{}"))
    with pytest.raises(ValueError, match="no valence"):
        read_scores(answer('{"x": 1}'))


def test_reward():
    got = read_scores(answer('{"valence": "', SURE, '", "arousal": "', SURE, '"}'))
    assert Scorer.reward(got, EmotionTarget(valence=1.5)) == pytest.approx(1)
    assert Scorer.reward(got, EmotionTarget(valence=1.5, arousal=-1.5)) == pytest.approx(0.5)


class Talkative(BaseChatModel):
    """Answers in prose unless a grammar holds it."""

    asked: list = Field(default_factory=list)
    knows: bool = False

    @property
    def _llm_type(self):
        return "talkative"

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        held = kwargs.get("structured_outputs")
        self.asked.append((messages[-1].text, held))
        text = '+1.5", "arousal": "-0.5' if held or self.knows else "about one and a half"
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


@pytest.mark.parametrize("knows", [True, False])
async def test_the_grammar_is_for_models_that_need_it(knows):
    model = Talkative(knows=knows, asked=[])
    scorer = score_only(model)
    said = scorer.invoke([HumanMessage("score:")]).text
    assert said == (await scorer.ainvoke([HumanMessage("score:")])).text == '+1.5", "arousal": "-0.5'
    assert {text for text, _ in model.asked} == {'{"valence": "'}
    grammar = {"regex": REST}
    assert [held for _, held in model.asked] == ([None] if knows else [None, grammar]) * 2
