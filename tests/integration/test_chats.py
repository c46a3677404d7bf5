"""What critic and rewriter said, as chats: read by `datasets`, and trained on by TRL without conversion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from emoloop.agents.rewriters import RewriteRequest, SimpleRewriter
from emoloop.agents.rewriters.base import KEPT
from emoloop.cli import app
from emoloop.domain import Critique, Emotion, EmotionTarget, UserError
from emoloop.events import Critiqued, HumanFeedback, Rewarded, Rewritten
from emoloop.traces.exchange.export import FORMATS, load_format
from emoloop.traces.store import open_store
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from rl_log import noise_image, run_events, settings_for
from typer.testing import CliRunner

LVLM = Path(__file__).parents[2] / "miniature" / "weights" / "lvlm"
CHATS = [name for name in FORMATS if name.startswith(("critic", "rewriter"))]

#: Mean rewards of the rounds: the second rewrite loses, the third was refused, the fourth gains most.
REWARDS = (0.1, 0.3, 0.2, 0.2, 0.5)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two runs that the embedded models could have written; a person read one picture of each otherwise."""
    with open_store(settings_for(tmp_path / "home")) as store:
        for run in range(2):
            target = EmotionTarget(valence=1.0, arousal=-1.0)
            for event in run_events(store, run, rounds=5, images=2, category=Emotion.AWE, target=target):
                if isinstance(event, Critiqued) and isinstance(event.critique, Critique):
                    said = event.critique.model_copy(update={"analysis": "a grey sky"})
                    event = event.model_copy(update={"critique": said, "prompt_version": "critic-compact@1"})
                elif isinstance(event, Rewarded):
                    event = event.model_copy(update={"value": REWARDS[event.round]})
                elif isinstance(event, Rewritten):
                    why = f"{KEPT}: too long" if event.round == 3 else "too dull"
                    told = {"prompt_version": "rewriter-compact@1", "why": why, "changes": "more light"}
                    event = event.model_copy(update=told)
                store.append(event)
            sha256 = store.blobs.put_image(noise_image(1000 * run))
            store.append(HumanFeedback(run_id=f"run-{run:04d}", sha256=sha256, valence=2.0))
    return tmp_path / "home"


def load(home: Path, name: str, out: Path) -> Any:
    from datasets import load_dataset

    done = CliRunner().invoke(app, ["traces", "export", name, "--out", str(out), "--home", str(home)])
    assert done.exit_code == 0, done.output
    return load_dataset(str(out), split="train", cache_dir=str(out.with_name("cache")))


def text(messages: list[dict[str, Any]]) -> str:
    return "".join(part["text"] or "<image>" for message in messages for part in message["content"])


def test_a_critic_teaches_what_it_or_a_person_read(home: Path, tmp_path: Path) -> None:
    rows = load(home, "critic-completion", tmp_path / "c")
    assert len(rows) == 20
    row = rows[0]
    assert text(row["prompt"]) == "criticprompt: a dog\ntarget: valence +1.0 arousal -1.0\n<image>critique:"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["images"][0].convert("RGB").tobytes() == noise_image(0).tobytes()
    read = [json.loads(text(row["completion"])) for row in rows]
    assert read[0] == {
        "analysis": "a grey sky", "valence": "+2.0", "arousal": "+0.0", "category": "awe", "alignment": "1.0",
        "suggestion": "",
    }  # fmt: skip
    assert [it["valence"] for it in read].count("+2.0") == 2
    whole = load(home, "critic-messages", tmp_path / "m")
    assert whole[0]["messages"] == row["prompt"] + row["completion"]
    pairs = load(home, "critic-preference", tmp_path / "p")
    scores = [[json.loads(text(row[side]))["valence"] for side in ("chosen", "rejected")] for row in pairs]
    assert scores == [["+2.0", "+0.0"]] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_datasets_loads_each_format_as_the_page_on_exports_says(
    name: str, home: Path, tmp_path: Path
) -> None:
    from datasets import load_dataset

    lines = {"jsonl": "", "reflection": "trajectories.jsonl"}
    out = tmp_path / ("events.jsonl" if name == "jsonl" else "set")
    with open_store(settings_for(home)) as store:
        count = load_format(name)[0](store, None, out)
    how = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    if name in lines:
        rows = load_dataset("json", data_files=str(out / lines[name]), **how)
    else:
        rows = load_dataset(str(out), **how)
    assert len(rows) == count > 0
    assert all(row is not None for row in rows)


async def test_a_rewriter_teaches_what_gained_by_the_question_that_it_was_asked(
    home: Path, tmp_path: Path
) -> None:
    rows = load(home, "rewriter-completion", tmp_path / "c")
    written = [json.loads(text(row["completion"]))["prompt"] for row in rows]
    assert written == [f"{thing} bright {number}" for thing in ("a dog", "a cat") for number in (1, 4)]
    asked: list[Any] = []

    class Recorder(GenericFakeChatModel):
        def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(messages)
            return super()._generate(messages, *args, **kwargs)

    with open_store(settings_for(home)) as store:
        result = store.run("run-0000")
    rewriter = SimpleRewriter(Recorder(messages=iter([text(rows[1]["completion"])])), "rewriter-compact")
    await rewriter.rewrite(RewriteRequest(result.prompt, result.target, result.rounds[:4]))
    assert text(rows[1]["prompt"]) == "".join(part["text"] if isinstance(part, dict) else part
                                              for it in asked[0] for part in it.content)  # fmt: skip
    pairs = load(home, "rewriter-preference", tmp_path / "p")
    found = [[json.loads(text(row[side]))["prompt"][-1] for side in ("chosen", "rejected")] for row in pairs]
    assert found[:3] == [["1", "2"], ["4", "1"], ["4", "2"]] and len(found) == 6
    assert all(not row["images"] for row in pairs)


def test_what_cannot_be_asked_again_is_refused(home: Path, tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path / "other")) as store:
        store.append(*run_events(store, 0, category=Emotion.AWE))
        for name, message in (
            ("critic-messages", "run-0000 was asked by prompt 1: no prompt '1'"),
            ("critic-preference", "run-0000 was asked by prompt 1"),
            ("rewriter-messages", "no rewrite of these runs gained"),
        ):
            with pytest.raises(UserError, match=message):
                load_format(name)[0](store, None, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.training
@pytest.mark.parametrize("name", CHATS)
def test_trl_trains_on_an_export_as_it_is(name: str, home: Path, tmp_path: Path) -> None:
    import trl
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows = load(home, name, tmp_path / "set")
    kind, config = (
        (trl.DPOTrainer, trl.DPOConfig) if "preference" in name else (trl.SFTTrainer, trl.SFTConfig)
    )
    processor = AutoProcessor.from_pretrained(LVLM)
    trainer = kind(
        model=AutoModelForImageTextToText.from_pretrained(LVLM),
        args=config(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[],
                    use_cpu=True, bf16=False, max_length=None, save_strategy="no"),
        train_dataset=rows,
        processing_class=processor,
    )  # fmt: skip
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss == result.training_loss
    assert any(not value.equal(before[name]) for name, value in trainer.model.named_parameters())


@pytest.mark.training
def test_a_language_model_learns_from_a_rewriter_as_the_page_on_exports_says(
    home: Path, tmp_path: Path
) -> None:
    import trl
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    page = (Path(__file__).parents[2] / "docs" / "howto" / "exports.md").read_text(encoding="utf-8")
    [code] = [it for it in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def as_text" in it]
    pairs = load(home, "rewriter-preference", tmp_path / "set")
    scope = {"load_dataset": lambda *_, **__: pairs}
    exec(code, scope)
    tokenizer = AutoTokenizer.from_pretrained(LVLM)
    # As a language model's template has it: what is said is text, not parts.
    tokenizer.chat_template = (
        "{% for it in messages %}{{ it.role + ': ' + it.content + eos_token }}{% endfor %}"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    trainer = trl.DPOTrainer(
        model=str(tmp_path / "model"),
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[],
                           use_cpu=True, bf16=False, save_strategy="no"),
        train_dataset=scope["rows"],
        processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.train().global_step == 2
