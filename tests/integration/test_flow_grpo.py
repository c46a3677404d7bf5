"""Flow-GRPO as a whole on a tiny pipeline: what it samples, logs and trains, and what it does when things go wrong."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import numpy as np
import online_helpers as helpers
import pytest
import rl_log
import tiny
import torch
from emoloop.domain import Failure, UserError
from emoloop.rl.objectives.base import per_row
from emoloop.rl.online import judging
from emoloop.rl.online.objective import FlowGRPO
from emoloop.rl.online.sample import sample_group
from emoloop.rl.policy import Policy
from emoloop.settings import Settings
from emoloop.tools.diffusion.adapter import load_artifact
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import family_of
from emoloop.tools.images.pipelines import load_pipeline
from emoloop.traces.store import open_store
from pydantic import PrivateAttr
from safetensors.torch import load_file
from scripted import Scripted, critic_answer


def policy_of(name: str) -> Policy:
    network = family_of(tiny.build(name), tiny.DEFAULTS[name]["call"])
    tokens = EmotionConditioner.for_embeds(network.encode("a dog"))
    policy = Policy(network, tokens, rank=4, alpha=8, steps=4, guidance=1.0, size=(32, 32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def weights(folder: Path) -> dict[str, bytes]:
    return {
        f"{file.name}:{key}": tensor.numpy().tobytes()
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Settings:
    return rl_log.settings_for(tmp_path / "home", generator={"model": str(model)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("model"))


TARGET = torch.tensor([[1.5, -1.0]])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_without_a_window_a_group_is_the_pipelines_own(name: str) -> None:
    """`Policy.sample` is held against the pipeline itself in test_distill_policy."""
    policy = policy_of(name)
    knobs = FlowGRPO(steps=4)
    told = policy.network.encode("a red house")
    clean, drawn = sample_group(policy, knobs.sde(policy), told, TARGET, [3, 4], range(0))
    expected = policy.sample(told.expand(2), TARGET.expand(2, 2), [3, 4], steps=4)
    assert not drawn
    for ours, theirs in zip(policy.network.decode(clean), expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("sampler", ["flow", "dance", "cps"])
def test_unchanged_weights_have_ratio_one_and_the_divergence_of_the_formula(name: str, sampler: str) -> None:
    policy = policy_of(name)
    knobs = FlowGRPO(steps=4, early=0.75, sampler=sampler, kl=2.0)  # type: ignore[arg-type]
    sde, told = knobs.sde(policy), policy.network.encode("a red house")
    _, drawn = sample_group(policy, sde, told, TARGET, [3, 4], range(1, 3), shared=True)
    assert [it.step for it in drawn] == [1, 2]
    # One row up to the window, then two that part.
    assert torch.equal(drawn[0].state[0], drawn[0].state[1])
    assert not torch.allclose(drawn[1].state[0], drawn[1].state[1])
    one = drawn[1]
    batch = {
        "prompt": told.expand(2), "target": TARGET.expand(2, 2), "step": torch.tensor([2, 2]), "state": one.state,
        "after": one.made.after, "mean": one.made.mean, "log_probability": one.made.log_prob,
        "advantage": torch.tensor([1.0, -0.5]),
    }  # fmt: skip
    loss, figures = knobs.loss(batch, policy, torch.Generator())
    assert figures["ratio_apart"] < 1e-5
    # KL of two Gaussians, per dimension, times |Δt|: ||μ - μ_ref||² |Δt| / 2 s².
    t = sde.times[2].expand(2)
    reference = sde.mean(one.state, policy.reference(one.state, t, told.expand(2), TARGET.expand(2, 2)), 2)
    s, dt = sde.deviation[2].double(), sde.elapsed[2].double()
    wanted = (per_row((one.made.mean - reference).double()) * dt / (2 * s * s)).mean().item()
    assert figures["kl"] == pytest.approx(wanted, rel=1e-4)
    assert loss.item() == pytest.approx(-0.25 + 2 * wanted, abs=1e-5, rel=1e-6)
    normal, _ = knobs.model_copy(update={"ratio_norm": True, "kl": 0.0}).loss(
        batch, policy, torch.Generator()
    )
    assert normal.item() == pytest.approx(-0.25 / dt.item(), rel=1e-4)


def test_a_training_leaves_an_artifact_and_a_log_like_the_loops(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = helpers.run(settings, out)
    assert (done.outcome.reason, done.outcome.steps) == ("finished", 6)
    written = lines(out)
    assert [it["step"] for it in written] == [1, 2, 3, 4, 5, 6]
    # The first update of a collection is made by the policy that sampled it.
    assert all(it["ratio_apart"] < 1e-5 for it in written[::2])
    assert all({"reward", "reward_spread", "groups_dropped", "missing"} <= it.keys() for it in written[::2])
    assert all({"ratio", "clipped", "kl"} <= it.keys() for it in written)
    record = json.loads((out / "training.json").read_text())
    assert record["source"] == "online" and record["critics"] == ["miniature"]
    with open_store(settings, read_only=True) as store:
        runs = store.runs()
        assert len(runs) == 3 * 2 and {run.status for run in runs} == {"completed"}
        rows = [row for run in runs for row in store.candidates(run.run_id)]
        assert len(rows) == 6 * 4 and all(row.reward is not None for row in rows)
        # A collection, a policy: the hash on each picture is that of the weights that made it.
        by_run = {run.run_id: {row.adapter for row in store.candidates(run.run_id)} for run in runs}
        assert all(len(it) == 1 for it in by_run.values())
        assert len({row.adapter for row in rows}) == 3
        result = store.run(runs[0].run_id)
        assert result.best is not None and len(result.rounds[0].candidates) == 4
    pipe = load_pipeline(model, torch.float32)
    assert load_artifact(pipe, out, call=tiny.DEFAULTS["sd3"]["call"]).emotion_tokens is not None


class Moody(Scripted):
    """Feels something else about each picture, however alike they are."""

    def _critique(self, messages: Any) -> str:
        digest = hashlib.sha256(str(messages[1].content).encode()).digest()
        return critic_answer(digest[0] / 64 - 2, digest[1] / 64 - 2)


def test_flux_learns_online_too(tmp_path: Path) -> None:
    folder = tiny.save("flux", tmp_path / "flux")
    settings = rl_log.settings_for(tmp_path / "home", generator={"model": str(folder)})
    helpers.run(settings, tmp_path / "out", "train.steps=2", "objective.sampler=cps", lvlm=Moody())
    assert [it["ratio_apart"] < 1e-5 for it in lines(tmp_path / "out")] == [True, False]
    assert load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")


@pytest.mark.training
def test_killed_anywhere_and_resumed_equals_undisturbed_to_the_bit(
    settings: Settings, tmp_path: Path
) -> None:
    whole = settings.model_copy(update={"home": tmp_path / "other"})
    more = ["objective.shared=true", "train.ema=0.5", "train.seed=4"]
    helpers.run(whole, tmp_path / "whole", *more)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["emoloop.rl.online.train"])
    out = tmp_path / "killed"
    # In the first collection, in the third (after a checkpoint), and in the second try at it.
    for turn, number in enumerate((3, 16, 0)):
        child = server.Process(target=helpers.run_until_killed, args=(settings, out, more, number, turn > 0))
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
    lvlm = Scripted()
    helpers.run(settings, out, *more, lvlm=lvlm, resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    # The last collection alone was asked for, since the last checkpoint lies before it.
    assert lvlm.calls["critic"] <= 8
    keep = ("step", "loss", "ratio", "reward")
    before, after = (
        [[it.get(key) for key in keep] for it in lines(tmp_path / name)] for name in ("whole", "killed")
    )
    assert before == after


def test_a_critic_that_goes_away_is_waited_for_and_nothing_is_lost(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(judging, "PAUSE", 0.0)
    whole = settings.model_copy(update={"home": tmp_path / "other"})
    helpers.run(whole, tmp_path / "whole", "train.steps=4")
    done = helpers.run(settings, tmp_path / "out", "train.steps=4", lvlm=Scripted(fail=helpers.away(10, 30)))
    assert done.outcome.reason == "finished"
    assert all(it["missing"] == 0 for it in lines(tmp_path / "out")[::2])
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    said = [record.getMessage() for record in caplog.records if "critic" in record.getMessage()]
    assert len([it for it in said if "training waits" in it]) == 1
    assert "answers again" in said[-1]


def test_a_critic_that_stays_away_ends_training_in_one_line_and_resumes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "PAUSE", 0.0)
    out, never = tmp_path / "out", 10**9
    with pytest.raises(Failure, match=r"does not answer: ConnectionError: nobody there"):
        helpers.run(settings, out, lvlm=Scripted(fail=helpers.away(0, never)))
    # How long it is waited for changes no weight.
    with pytest.raises(Failure, match=r"has not answered for 0 s .*--resume"):
        helpers.run(
            settings, out, "objective.patience=0", resume=True, lvlm=Scripted(fail=helpers.away(12, never))
        )
    helpers.run(settings, out, "objective.patience=0", resume=True)
    whole = settings.model_copy(update={"home": tmp_path / "other"})
    helpers.run(whole, tmp_path / "whole", "objective.patience=0")
    assert weights(out) == weights(tmp_path / "whole")


class Blind(Scripted):
    """Has no words for the first two pictures that it sees."""

    _first: list[str] = PrivateAttr(default_factory=list)

    def _critique(self, messages: Any) -> str:
        picture = str(messages[1].content)
        if len(self._first) < 2 and picture not in self._first:
            self._first.append(picture)
        return "no JSON at all" if picture in self._first else super()._critique(messages)


def test_a_reward_that_is_missing_drops_its_picture(settings: Settings, tmp_path: Path) -> None:
    helpers.run(settings, tmp_path / "out", "train.steps=2", lvlm=Blind())
    assert lines(tmp_path / "out")[0]["missing"] == 2
    with open_store(settings, read_only=True) as store:
        rows = [row for run in store.runs() for row in store.candidates(run.run_id)]
        assert len([row for row in rows if row.reward is None and row.missing]) == 2


def test_rewards_that_are_all_equal_are_one_clear_line(settings: Settings, tmp_path: Path) -> None:
    same = Scripted(fail=lambda role, number: critic_answer())
    with pytest.raises(
        Failure, match=r"collection 0: nothing to learn from 8 rewards of 8 pictures.*all equal"
    ):
        helpers.run(settings, tmp_path / "out", lvlm=same)


def test_weights_that_became_no_numbers_end_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def spoil(self: Any, *rest: Any) -> None:
        step(self, *rest)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(Failure, match=r"the loss became nan at step 1"):
        helpers.run(settings, tmp_path / "out")


def test_a_full_disk_ends_training_in_one_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emoloop.traces.blobs import BlobStore

    put, left = BlobStore.put_many, [10]

    def full(self: Any, several: Any, suffix: str) -> list[str]:
        left[0] -= len(several)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return put(self, several, suffix)

    monkeypatch.setattr(BlobStore, "put_many", full)
    with pytest.raises(Failure, match=r"cannot keep a picture of grpo-.*No space left on device; .*--resume"):
        helpers.run(settings, tmp_path / "out")
    monkeypatch.undo()
    assert helpers.run(settings, tmp_path / "out", resume=True).outcome.reason == "finished"


def test_a_second_training_starts_from_the_first_and_is_held_to_it(
    settings: Settings, tmp_path: Path
) -> None:
    helpers.run(settings, tmp_path / "one")
    helpers.run(settings, tmp_path / "two", f"policy.previous={tmp_path / 'one'}")
    first = lines(tmp_path / "two")[0]
    # It starts where the first ended: no way from there at the first step.
    assert first["kl"] < 1e-9 < lines(tmp_path / "two")[-1]["kl"]
    record = json.loads((tmp_path / "two" / "training.json").read_text())
    pipe = load_pipeline(Path(settings.generator.model), torch.float32)
    assert (
        record["base"]["adapter"]
        == load_artifact(pipe, tmp_path / "one", call=tiny.DEFAULTS["sd3"]["call"]).id
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["objective.groups=3"], r"a collection has 24 rows .* take 16"),
        (["train.steps=5"], r"train\.steps has to be a multiple of objective\.updates \(2\)"),
        (["policy.dropout=0.1"], r"policy\.dropout"),
        (["objective.window=4", "train.batch_size=16"], r"objective\.window 4 does not fit"),
        (["objective.sampler=cps", "objective.noise_level=1"], r"cps wants less than 1"),
        (["data.held_out=0.999999"], r"all 6 requests are held out"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    more: list[str], said: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        helpers.run(settings, tmp_path / "out", *more)
