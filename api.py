"""What a Python program calls beside the loop: rewrite a prompt, open a log, distil from it, evaluate.

Each function takes plain arguments, finds the settings as the command line does, and calls the room that does
the work. The heavy libraries are loaded by the call.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .domain import EmotionTarget
from .rl.config import load_config, preset_for
from .settings import (
    GeneratorSettings,
    LVLMSettings,
    Settings,
    generator_settings,
    load_settings,
    lvlm_settings,
    pruned,
)

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from rich.progress import Progress

    from .graph.rewriting import Rewriting
    from .rl.distill import Distilled
    from .rl.trainer import Watcher
    from .traces.rows import RunFilter
    from .traces.store import TraceStore


def rewrite(
    prompt: str,
    target: EmotionTarget | Mapping[str, Any],
    *,
    rewriter: str | None = None,
    count: int = 1,
    seed: int = 0,
    lvlm: str | Path | Mapping[str, Any] | LVLMSettings | BaseChatModel | None = None,
    settings: Settings | None = None,
) -> Rewriting:
    """Rewrite a prompt so that its picture makes people feel what is wanted; nothing is painted or logged.

    Inside asyncio, await `emoloop.graph.rewriting.rewrite`.

    Args:
        prompt: The neutral prompt.
        target: The wanted emotion.
        rewriter: `simple`, `mc_agent` or a dotted path; by default that of the settings.
        count: How many different prompts.
        seed: Draws personas, and several prompts.
        lvlm: A preset, folder or hub id, a server's URL, settings, or any LangChain chat model.
        settings: Resolved settings; by default those of environment and `emoloop.toml`.

    Raises:
        UserError: The request is wrong, or the model or rewriter cannot be used.
    """
    from .graph.rewriting import rewrite as ask

    spec, model = (
        (lvlm, None)
        if lvlm is None or isinstance(lvlm, str | Path | Mapping | LVLMSettings)
        else (None, lvlm)
    )
    resolved = load_settings(pruned({"loop": {"rewriter": rewriter}, "lvlm": lvlm_settings(spec)}), settings)
    return asyncio.run(ask(prompt, target, resolved, count=count, seed=seed, lvlm=model))


def open_log(
    home: str | Path | None = None, *, settings: Settings | None = None, write: bool = False
) -> TraceStore:
    """Open the log, to be used as a context manager.

    Args:
        home: Folder of the log; by default that of the settings.
        settings: Resolved settings; by default those of environment and `emoloop.toml`.
        write: Open it for appending, and begin one where there is none.

    Raises:
        UserError: There is no log to read, or the home cannot be written.
    """
    from .traces.store import open_store

    return open_store(load_settings({"home": home}, settings), read_only=not write)


def distill(
    objective: str,
    out: str | Path,
    *,
    home: str | Path | None = None,
    where: RunFilter | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    knobs: Mapping[str, Any] | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
    settings: Settings | None = None,
) -> Distilled:
    """Train the diffusion weights on logged runs, so that one pass gives what the loop gave.

    Args:
        objective: opd, dpo, contrast, npo, nft, rwr, sft, or a dotted path (`my_pkg.my_mod:MyObjective`).
        out: Folder of the artifact.
        home: Folder of the log; by default that of the settings.
        where: Which runs; by default all.
        preset: The name of one in `rl/presets/`; by default the one of the model that made the images.
        config: YAML file over the preset.
        knobs: Over the file, by dotted name: `{"train.steps": 200}`.
        resume: Go on from the newest checkpoint in `out`.
        watch: Called after each step with its number, the number of steps and the figures.
        settings: Resolved settings; by default those of environment and `emoloop.toml`.

    Returns:
        The artifact's folder, how training ended, and the figures.

    Raises:
        UserError: Wrong input, before anything is trained.
        Failure: Training broke off; the last good checkpoint is intact.
    """
    from .rl.distill import distill as run
    from .traces.rows import RunFilter

    resolved = load_settings({"home": home}, settings)
    where = where or RunFilter()
    file = None if config is None else Path(config)
    chosen = preset or preset_for(logged_model(resolved, where), file)
    words = [f"{key}={json.dumps(value)}" for key, value in (knobs or {}).items()]
    return run(
        resolved, load_config(objective, chosen, file, words), Path(out), where, resume=resume, watch=watch
    )


def evaluate(
    suite: str | Path,
    out: str | Path | None = None,
    *,
    arms: Sequence[str] | None = None,
    judge: str | None = None,
    guard: str | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    critic: str | Path | None = None,
    limit: int | None = None,
    allow_reward_judge: bool = False,
    home: str | Path | None = None,
    generator: str | Path | Mapping[str, Any] | GeneratorSettings | None = None,
    lvlm: str | Path | Mapping[str, Any] | LVLMSettings | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge arms on a suite and write `report.json`, `report.csv` and `report.html`.

    Args:
        suite: Name of a shipped suite, or a YAML file.
        out: Folder for the report; by default `eval-SUITE`.
        arms: Names, `NAME=KEY=VALUE,…`, `NAME=ADAPTER-FOLDER` or `NAME=pkg.mod:function`; by default the suite's.
        judge: `law`, `lvlm[:MODEL]`, `clip:ENCODER,HEAD`, `human:FILE.csv` or a dotted path.
        guard: A second reader; the same words.
        adapter: Artifact behind the arms `adapter` and `loop_on_adapter`; or several by name.
        critic: Model behind the arms NAME`+critic`.
        limit: Only the first so many neutral prompts.
        allow_reward_judge: Let a judge speak that gave the reward; the report says so.
        home: Evaluations keep their log in `HOME/evals`.
        generator: A preset, folder or hub id, or settings.
        lvlm: A preset, folder, hub id, URL or engine, or settings.
        processes: How many processes share the work.
        progress: Shows how far it is.

    Returns:
        The report as a document, with `figures`, a flat map from name to number.

    Raises:
        UserError: An unknown suite, arm or judge, or a judge that also gave the reward.
        Failure: An arm answered nothing at all; what is made is kept.
    """
    from .evals.document import Options
    from .evals.evaluate import evaluate as run

    named = adapter if isinstance(adapter, Mapping) else {} if adapter is None else {"adapter": adapter}
    options = Options(
        suite=str(suite),
        arms=None if arms is None else list(arms),
        judge=judge,
        guard=guard,
        adapters={name: Path(folder) for name, folder in named.items()},
        critic=None if critic is None else str(critic),
        allow_reward_judge=allow_reward_judge,
        limit=limit,
        settings={"home": home, "generator": generator_settings(generator), "lvlm": lvlm_settings(lvlm)},
    )
    return run(options, Path(out or f"eval-{Path(suite).stem}"), progress, processes)[0]


def logged_model(settings: Settings, where: RunFilter) -> str:
    """The model that made the images of the chosen runs.

    Raises:
        UserError: No log, no image, or several models.
    """
    from .rl.rollouts import origin
    from .traces.store import open_store

    with open_store(settings, read_only=True) as store:
        return origin(store, where)[0].model
