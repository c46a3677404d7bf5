"""A rewriter of your own in one file, named by a dotted path."""

from emoloop import EmotionTarget, open_loop
from emoloop.agents.ask import Asker
from emoloop.agents.rewriters import Rewrite, RewriteRequest


class Scenery:
    """Adds light or a thing that suits the sign of the target; another one for each round.

    Args:
        asker: Asks the LVLM of the loop; a rewriter that thinks with a model calls `asker.ask(…)`.
        prompt: Name of the rewriter's prompt file, from the settings.
    """

    name = "scenery"
    # Both go into the log: what wrote the prompt, and by which rules.
    model = "none"
    prompt_id = "scenery@1"
    # A round of it is one prompt, painted with several seeds.
    one_prompt = True

    def __init__(self, asker: Asker, prompt: str) -> None:
        pass

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """The prompt of the next round; `request.rounds` holds what was tried and read so far."""
        pleasant = (request.target.point[0] or 0) > 0
        words = ("in bright light", "with a rainbow") if pleasant else ("in dark light", "with a skull")
        chosen = words[len(request.rounds) % len(words)]
        return Rewrite(f"{request.neutral} {chosen}", changes=f"+ {chosen}", why="the target's sign")


if __name__ == "__main__":
    # The same on the command line: `emoloop run … --set loop.rewriter=my_rewriter:Scenery`
    # This one writes one prompt a round; one that gives several has a `propose` too (docs/howto/rewriter.md).
    with open_loop(loop={"rewriter": "my_rewriter:Scenery", "rounds": 3, "images": 2}) as loop:
        result = loop.run_sync("a dog by the sea", EmotionTarget(valence=-2, arousal=1), seed=7)
    for round in result.rounds:
        print(f"{round.mean_reward:.2f}  {round.prompt}")
