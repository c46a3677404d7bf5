"""The planted cheat: a gradient really runs from the critic's words to the adapter, and the adapter loads."""

import pytest
from emoloop.evals.bench import cheat
from emoloop.settings import load_settings
from emoloop.tools.generator import load_generator


@pytest.mark.training
def test_the_critic_teaches_an_adapter_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(cheat, "SCENES", 20)
    # Saving refuses a LoRA that changes nothing.
    cheat.plant(tmp_path / "cheat", steps=2, batch=2, lr=1e-2, seed=0)
    settings = load_settings().generator.model_copy(update={"adapter": str(tmp_path / "cheat")})
    assert load_generator(settings.model, settings).describe()["adapter"]
