"""The rewriter `mc_agent`: personas draft, a director merges or picks, and both are checked.

A general model is asked by prompt files: each persona by a chain of concepts, then the director. A model that was
trained on a rewriter's format of its own (its prompt file names no `personas`) writes in that: a persona asks for the
target as it feels it, and the director picks by expected reading and difference, without a question.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from langchain_core.language_models import BaseChatModel

from ....domain import HIGH, LOW, Draft, EmotionTarget, Missing
from ...ask import Asker, Reply
from ...prompt import load_prompt
from ...schemas import RewriterAnswer, RewriterAnswers, several_schema, target_text
from .. import history
from ..base import Rewrite, RewriteRequest
from ..simple import (
    TOKENS,
    SimpleRewriter,
    keep_best,
    number_seed,
    prompt_limit,
    question,
    rewrite_schema,
    unusable,
)
from . import persona
from .answer import PersonaAnswer, persona_schema
from .choose import choose
from .drawable import cut, lost
from .graph import MC_AGENT, Context, Question, State
from .panel import Answered, Panel

#: Tokens that a persona's answer may take.
_TOKENS = 900


class MCAgent:
    """Several personas write, a director chooses.

    Args:
        model: Any LangChain chat model, or an `Asker` that shares one.
        prompt: Name or path of the simple rewriter's prompt file, which names the personas'.
    """

    name = "mc_agent"
    chooses = True

    def __init__(self, model: BaseChatModel | Asker, prompt: str = "rewriter"):
        self.asker = model if isinstance(model, Asker) else Asker(model)
        self.simple = SimpleRewriter(self.asker, prompt)
        self.prompt = load_prompt(self.simple.prompt.personas or prompt)
        self.director = load_prompt(self.prompt.several) if self.simple.prompt.personas else None

    @property
    def model(self) -> str:
        """The model's name, for the log."""
        return self.asker.name

    @property
    def prompt_id(self) -> str:
        """Names and versions of the prompt files, for the log; not in the form of a single one, whose answer it is."""
        files = [self.prompt, *([self.director] if self.director else [])]
        return " ".join(["mc_agent", *(f"{it.name}.{it.version}" for it in files)])

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """See `Rewriter`."""
        [first, *_] = await self.propose(replace(request, count=1))
        return first

    async def propose(self, request: RewriteRequest) -> list[Rewrite]:
        """Several prompts that differ; by the simple rewriter where no persona has a draft that can be used.

        A director that only picks has `spare` drafts to pick from, without any two for each prompt.
        """
        context = Context(self, request.panel or Panel(), request)
        count = request.count
        drafts = count if self.director else count + (request.spare or count)
        begin: State = {
            "count": count,
            "start": request.start,
            "seed": request.seed,
            "questions": max(context.panel.personas, drafts),
        }
        done: dict[str, Any] = await MC_AGENT.ainvoke(begin, context=context)
        if done["prompts"]:
            return [Rewrite(**it) for it in done["prompts"]]
        reasons = [it["reason"] for it in done["drafts"]]
        note = f"no persona's draft can be used ({reasons[0]}): the simple rewriter wrote"
        written = [_checked(request, it) for it in await self.simple.propose(request)]
        told = (replace(it, prompt_id=it.prompt_id or self.simple.prompt_id) for it in written)
        return [
            replace(it, notes=(note, *it.notes) if place == 0 else it.notes) for place, it in enumerate(told)
        ]

    async def draft(self, asked: Question, context: Context) -> Answered:
        """Ask one persona, and check what it wrote."""
        request, number = context.request, asked["number"]
        limit = prompt_limit(request.neutral)
        who = persona.load(context.panel.folder)[asked["persona"]]
        sampled: dict[str, Any] = {
            "seed": number_seed(asked["seed"], number),
            "temperature": self.asker.variety,
        }
        reply: Reply[Any]
        said: dict[str, str] = {}
        if self.director:
            messages = self.prompt.messages(persona=who, **_told(request), limit=limit)
            schema = persona_schema(limit)
            reply = await self.asker.ask(
                messages, PersonaAnswer, "persona", schema, **sampled, max_tokens=_TOKENS
            )
        else:
            felt = as_felt(request.target, who)
            said["target"] = target_text(felt)
            messages = question(self.prompt, replace(request, target=felt), number)
            reply = await self.asker.ask(
                messages, RewriterAnswer, "rewrite", rewrite_schema(limit), **sampled
            )
        if isinstance(answer := reply.answer, Missing):
            draft = Draft(persona=who.name, said=said, reason=answer.reason)
        else:
            own = answer.said() if self.director else {"why": answer.why, "changes": answer.changes}
            prompt, refused, reason = checked(request.neutral, answer.prompt)
            draft = Draft(persona=who.name, said=said | own, prompt=prompt, refused=refused, reason=reason)
        return Answered(draft, self.model, self.prompt.id, reply.usage, reply.seconds, reply.error)

    async def direct(self, drafts: dict[int, Draft], state: State, context: Context) -> list[dict[str, Any]]:
        """Hand over prompts: the director's own, then picks of the drafts; none where no draft can be used."""
        count, usable = state["count"], [it for it in drafts.values() if it.reason is None]
        written: list[dict[str, Any]] = []
        notes: list[str] = []
        if usable and self.director:
            written, notes = await self._written(usable, count, state, context)
        left = [it for it in usable if it.prompt not in {one["prompt"] for one in written}]
        about = context.request
        picked = choose(
            [it.prompt for it in left], count - len(written), about.neutral, about.target, about.rounds
        )
        for place, error in picked:
            draft = left[place]
            near = "" if error is None else f"expected to be {error:.1f} off the target, and "
            why = f"{draft.persona}'s, picked of {len(left)} drafts: {near}unlike the others"
            changes = draft.said.get("changes") or draft.said.get("concepts", "")
            written.append({"prompt": draft.prompt, "changes": changes, "why": why})
        first = state["start"]
        return [
            {**it, "number": number, "notes": tuple(notes) if number == first else ()}
            for number, it in enumerate(written, first)
        ]

    async def _written(
        self, usable: list[Draft], count: int, state: State, context: Context
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """What a director that writes hands over, and why not all that it wrote."""
        assert self.director is not None
        request = context.request
        limit = prompt_limit(request.neutral)
        reply = await self.asker.ask(
            self.director.messages(drafts=usable, **_told(request), limit=limit, count=count),
            RewriterAnswers,
            "director",
            several_schema(limit, count),
            seed=number_seed(state["seed"], -1 - state["start"]),
            temperature=self.asker.variety,
            max_tokens=TOKENS * (count + 1),
        )
        spent = {"usage": reply.usage, "seconds": reply.seconds}
        if isinstance(reply.answer, Missing):
            return [], [f"the director gave no answer ({reply.answer.reason}): drafts are taken as they are"]
        out: list[dict[str, Any]] = []
        notes: list[str] = []
        for one in reply.answer.prompts[:count]:
            prompt, refused, reason = checked(request.neutral, one.prompt)
            if refused:
                notes.append(f"of the director's words nobody can draw: {', '.join(refused)}")
            if reason:
                notes.append(f"a prompt of the director was refused: {reason}")
            elif prompt not in {it["prompt"] for it in out}:
                out.append({"prompt": prompt, "changes": one.changes, "why": one.why or reply.answer.why})
        if out:
            out[0] |= spent  # the answer is paid for once
        return out, notes


def as_felt(target: EmotionTarget, who: persona.Persona) -> EmotionTarget:
    """The target for a model that knows common feeling alone: less by what the persona feels beyond that."""

    def shifted(aim: float | None, more: float) -> float | None:
        return None if aim is None else round(min(max(aim - more, LOW), HIGH), 1)

    felt = {axis: shifted(getattr(target, axis), getattr(who.feels, axis)) for axis in ("valence", "arousal")}
    return target.model_copy(update=felt)


def checked(neutral: str, prompt: str) -> tuple[str, list[str], str | None]:
    """A prompt without what cannot be drawn, the words refused for that, and why it cannot be used, if so."""
    kept, refused = cut(neutral, prompt)
    if prompt and not kept:
        return "", refused, f"nobody can draw it: {', '.join(refused)}"
    gone = lost(neutral, kept)
    return (
        kept,
        refused,
        unusable(kept, prompt_limit(neutral)) or (f"it loses {', '.join(gone)}" if gone else None),
    )


def _checked(request: RewriteRequest, written: Rewrite) -> Rewrite:
    """What the simple rewriter wrote, under the same checks; what fails them leaves the best prompt so far."""
    prompt, words, reason = checked(request.neutral, written.prompt)
    if written.refused or not (words or reason):
        return written
    if reason:
        return keep_best(request, reason, written)
    note = f"nobody can draw what was cut: {', '.join(words)}"
    return replace(written, prompt=prompt, notes=(*written.notes, note))


def _told(request: RewriteRequest) -> dict[str, Any]:
    """What personas and director are told of the request and of what was tried."""
    return {
        "prompt": request.neutral,
        "target": target_text(request.target),
        "rounds": history.telling(request.neutral, request.rounds, request.target),
        "comment": request.comment,
    }
